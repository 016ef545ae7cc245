"""incidents.jsonl in the run folder: what went wrong, what was decided, and with which documents.

    {"at", "stage", "stage_index", "step", "what", "decision", "reason", ...}

`decision` is skip, stop, note (nothing changed), rollback, or restart. Rows of the first three belong to their step: a
run that resumes before it decides again, so the row is dropped then, and no step has two. A roll-back is the source of
truth for the steps that are to be skipped after it: its row is on the disk before anything goes back, so a kill at any
moment later does not forget it. Rows about ranks and nodes (restart, and notes marked "lasting") stay for good.

`smol report` reads the rows too, so torch is imported only by what looks at gradients.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smol.data.files import write_whole
from megatron_smol.data.inspect import batch_of_step, read_rows
from megatron_smol.errors import UserError
from megatron_smol.recipe.plan import StagePlan
from megatron_smol.slurm.legs import append_row

if TYPE_CHECKING:
    from megatron_smol.train.step import Engine
    from megatron_smol.train.trainer import Trainer

INCIDENTS = "incidents.jsonl"
NAMES_SHOWN = 3


def read_incidents(run: Path) -> list[dict[str, Any]]:
    """All rows of a run, oldest first; a line that a kill left torn is no row."""
    try:
        lines = (run / INCIDENTS).read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def write_incident(run: Path, row: dict[str, Any]) -> None:
    """Append one row, on the disk when this returns. Called by one rank."""
    append_row(run / INCIDENTS, row)


def drop_undone(run: Path, progress: tuple[int, int]) -> list[dict[str, Any]]:
    """Drop the rows of steps beyond `progress`, which are to be decided again; returns what is left. By one rank."""
    found = read_incidents(run)
    left = [row for row in found if _stands(row, progress)]
    if found and left != found:
        write_whole(run / INCIDENTS, "".join(json.dumps(row) + "\n" for row in left))
    return left


def _stands(row: dict[str, Any], progress: tuple[int, int]) -> bool:
    if row.get("decision") == "restart" or row.get("lasting"):
        return True
    if progress == (0, 0):  # no checkpoint: the run starts over
        return False
    return row.get("decision") == "rollback" or (row["stage_index"], row["step"]) <= progress


def documents_of(trainer: Trainer, stage: StagePlan, step: int) -> dict[str, dict[str, list[int]]] | str:
    """Documents of a step's global batch: source -> shard -> numbers, as `smol inspect` counts them."""
    recipe, orders = trainer.plan.recipe, trainer.plan.orders
    try:
        batch = batch_of_step(trainer.plan.stages, orders, stage.name, step)
        contents = read_rows(recipe, stage, orders, batch)
    except (UserError, OSError) as error:
        return f"not found: {error}"
    found: dict[str, dict[str, set[int]]] = {}
    for index, content in zip(batch.rows.source.tolist(), contents, strict=True):
        shards = found.setdefault(batch.rows.names[index], {})
        for part in content.documents:
            shards.setdefault(part.shard, set()).add(part.document)
    return {
        source: {shard: sorted(numbers) for shard, numbers in shards.items()}
        for source, shards in found.items()
    }


def bad_gradients(engine: Engine) -> list[dict[str, Any]]:
    """Where gradients are not finite: rank, host, the first parameters and how many; the same list on all ranks.

    After the reduction a rank holds the sum over data-parallel ranks for its own shard, and for the rest still its own
    gradients: who has something not finite in the rest is the origin. Where none has, it is the owner of the
    shard. With parallel.distributed_optimizer: false all hold the sum, and the origin cannot be told.
    """
    import torch

    own, summed = _not_finite(engine)
    here = {"rank": torch.distributed.get_rank(), "host": socket.gethostname(), "own": own, "summed": summed}
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, here)
    told = any(entry["own"] for entry in found)
    replicated = not engine.parts[0].ddp_config.use_distributed_optimizer
    rows = []
    for entry in found:
        names = entry["own"] if told else entry["summed"]
        if names:
            origin = {"origin": "not known, all data-parallel ranks hold the sum"} if replicated else {}
            shown = {"parameters": names[:NAMES_SHOWN], "count": len(names)}
            rows.append({"rank": entry["rank"], "host": entry["host"], **shown, **origin})
    return rows


def _not_finite(engine: Engine) -> tuple[list[str], list[str]]:
    """Names of parameters whose gradient is not finite: outside this rank's reduced shard, and inside it."""
    import torch

    from megatron_smol.model.llama import named_global_parameters

    own, summed = [], []
    for part, gpt in zip(engine.parts, engine.gpts, strict=True):
        names = {parameter: name for name, parameter, _ in named_global_parameters(gpt)}
        for buffer in part.buffers:
            for bucket in buffer.buckets:
                low, high = _summed_range(part, bucket)
                for parameter in bucket.params_list:
                    start, end, _ = buffer.param_index_map[parameter]
                    bad = torch.isfinite(buffer.grad_data[start:end]).logical_not_()
                    inside = bad[max(low - start, 0) : max(high - start, 0)]
                    count, count_inside = int(bad.sum()), int(inside.sum())
                    if count > count_inside:
                        own.append(names[parameter])
                    if count_inside:
                        summed.append(names[parameter])
    return own, summed


def _summed_range(part: Any, bucket: Any) -> tuple[int, int]:
    """[low, high) of the gradient buffer that holds sums over data-parallel ranks after the reduction."""
    from megatron.core import parallel_state

    size, total = bucket.grad_data.numel(), parallel_state.get_data_parallel_world_size(True)
    if total == 1:
        return bucket.offset, bucket.offset
    if not part.ddp_config.use_distributed_optimizer:
        return bucket.offset, bucket.offset + size
    low = bucket.offset + parallel_state.get_data_parallel_rank(True) * (size // total)
    return low, low + size // total
