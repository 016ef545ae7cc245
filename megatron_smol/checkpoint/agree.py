"""Every rank learns of every rank's failure before anything else happens.

The commonest hang of trainers is an exception on one rank while the others wait in a collective
(reliability.md section 4 in the design notes; NeMo-Automodel#3254). `together` turns that into one error,
the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_smol.errors import CheckpointError


@contextmanager
def together(doing: str, *, only_rank: int | None = None) -> Iterator[bool]:
    """Run the block on all ranks (or one) and raise CheckpointError everywhere if it failed anywhere.

    Yields whether this rank has work to do: ``with together("writing x", only_rank=0) as mine: if mine: ...``
    The block must not contain collectives that a failing rank would skip.
    """
    rank = torch.distributed.get_rank()
    error: str | None = None
    try:
        yield only_rank is None or rank == only_rank
    except Exception as exception:
        error = f"{exception}" if isinstance(exception, CheckpointError) else f"{type(exception).__name__}: {exception}"
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    failed = {r: e for r, e in enumerate(errors) if e}
    if failed:
        first = next(iter(failed))
        ranks = "" if len(errors) == 1 else f" (rank {', '.join(map(str, failed))} of {len(errors)})"
        raise CheckpointError(f"{doing} failed{ranks}: {failed[first]}")
