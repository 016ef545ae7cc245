"""Are copies of the same weights still the same? A hook that compares them bit by bit every so many steps.

Data-parallel ranks hold copies of all weights, tensor-parallel ranks of the norms. Nothing but a fault makes them
differ: a flipped bit, a GPU that computes wrongly, a gradient that was not reduced (in BLOOM's run layer norms drifted
apart over tensor-parallel ranks). With the distributed optimizer a step replaces all but a rank's own shard of its
weights, so there a flip is found only if it happens within the step that is looked at.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_smol.errors import RunError
from megatron_smol.model.llama import named_global_parameters
from megatron_smol.train.hooks import Hook, StepDone
from megatron_smol.train.incidents import write_incident
from megatron_smol.train.step import Engine

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer


class ReplicaCheck(Hook):
    """Stops the run (exit code 5) when copies differ, naming the rank that is alone with its copy."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        if not self._every or done.step % self._every:
            return
        found = differing_copies(trainer.engine)
        if not found:
            return
        who = "; ".join(f"rank {row['rank']} on {row['host']}: {row['parameter']}" for row in found[:3])
        reason = f"step {done.step} of '{done.stage.name}': copies of the same weights differ: {who}"
        if torch.distributed.get_rank() == 0:
            place = {"stage": done.stage.name, "stage_index": done.stage.index, "step": done.step}
            told = {"what": "copies differ", "decision": "stop", "reason": reason, "copies": found}
            write_incident(trainer.plan.recipe.run_path, place | told)
        trainer.say(f"!! {reason}")
        error = RunError(
            f"{reason}; hardware may compute wrongly there: keep that node out, then start again from a checkpoint "
            "before the damage"
        )
        error.alike = True
        raise error


def differing_copies(engine: Engine) -> list[dict[str, Any]]:
    """Copies that differ from most others (from each other, where there are two): the same list on all ranks.

    Rows: {"rank", "host", "parameter", "of"}; of: whose copies were compared, "data parallel" or "tensor parallel".
    """
    names, sums, shared = [], [], []
    for part, gpt in zip(engine.parts, engine.gpts, strict=True):
        if (
            part.ddp_config.overlap_param_gather
        ):  # the updated weights may still be with the ranks that own them
            part.start_param_sync(force_sync=True)
        for name, parameter, split in named_global_parameters(gpt):
            names.append(name)
            sums.append(_checksum(parameter))
            shared.append(split is None)
    mine = torch.stack(sums)
    wrong = _outvoted(mine, parallel_state.get_data_parallel_group(with_context_parallel=True))
    rows = [(names[i], "data parallel") for i in wrong]
    norms = [i for i, is_shared in enumerate(shared) if is_shared]
    wrong = _outvoted(mine[norms], parallel_state.get_tensor_model_parallel_group())
    rows += [(names[norms[i]], "tensor parallel") for i in wrong]
    here = {"rank": torch.distributed.get_rank(), "host": socket.gethostname()}
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, [here | {"parameter": n, "of": of} for n, of in rows])
    return [row for rows_of_rank in found for row in rows_of_rank]


def _checksum(parameter: Tensor) -> Tensor:
    """Sum of the bit patterns: any single flip changes it."""
    bits = parameter.detach().contiguous().view(torch.int32 if parameter.element_size() == 4 else torch.int16)
    return bits.sum(dtype=torch.int64)


def _outvoted(mine: Tensor, group: torch.distributed.ProcessGroup) -> list[int]:
    """Indices at which this rank's value is not the one that more than half of the group holds."""
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return []
    copies = [torch.empty_like(mine) for _ in range(size)]
    torch.distributed.all_gather(copies, mine, group=group)
    columns = torch.stack(copies).T.tolist()
    own = mine.tolist()
    wrong = []
    for index, column in enumerate(columns):
        value, count = Counter(column).most_common(1)[0]
        if len(set(column)) > 1 and not (2 * count > size and own[index] == value):
            wrong.append(index)
    return wrong
