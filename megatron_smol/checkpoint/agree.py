"""Every rank learns of every rank's failure before anything else happens.

The commonest hang of trainers is an exception on one rank while the others wait in a collective
(NeMo-Automodel#3254 is one of many). `together` turns that into one error, the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.model.backend import backend


@contextmanager
def together(doing: str, *, only_rank: int | None = None) -> Iterator[bool]:
    """Run the block on all ranks (or one); if it failed anywhere, raise the first failure everywhere.

    Yields whether this rank has work to do: ``with together("writing x", only_rank=0) as mine: if mine: ...``
    A UserError is raised as it is, anything else as a CheckpointError that says what was being done. The block
    must not contain collectives that a failing rank would skip.
    """
    rank = torch.distributed.get_rank()
    failure: UserError | None = None
    try:
        yield only_rank is None or rank == only_rank
    except UserError as error:
        failure = error
    except Exception as error:
        failure = CheckpointError(f"{doing} failed: {type(error).__name__}: {error}")
    failures: list[UserError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            found.alike = True
            raise found


def everywhere(here: bool) -> bool:
    """Whether it is so on all ranks; the same answer on each."""
    flag = torch.tensor([here], dtype=torch.int32, device=backend().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)
