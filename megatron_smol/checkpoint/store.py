"""Save and load an Engine through megatron-core's distributed checkpoints, whatever the layout.

Tensors go through `dist_checkpointing` in the `fully_reshardable` form, so that a checkpoint written at
DP 2 loads at TP 2. Everything that is not a tensor is in state.json (see checkpoint/folder.py).
"""

from __future__ import annotations

import logging
import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint.agree import together
from megatron_smol.checkpoint.folder import Checkpoint
from megatron_smol.checkpoint.safe import check_metadata
from megatron_smol.errors import CheckpointError
from megatron_smol.train.optim import load_optimizer_state
from megatron_smol.train.step import Engine

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class _InProcessWriter(filesystem_async.FileSystemWriterAsync):
    """Writes in this process. The stock writer forks helpers that outlive a killed rank and go on writing
    (and spawns a manager that imports everything: 6 s for a tiny model on two cores)."""

    def get_save_function_and_args(self):  # type: ignore[no-untyped-def]
        write, preload, arguments = super().get_save_function_and_args()
        return (self._write, preload, arguments) if write else (write, preload, arguments)

    def _write(self, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
        written: dict[int, Any] | Exception = {}
        transforms = [self.transforms] if hasattr(self, "transforms") else []
        for index, bucket in enumerate(buckets):
            one: queue.Queue[Any] = queue.Queue()
            token: queue.Queue[Any] = queue.Queue()
            token.put(index)
            self.write_preloaded_data(transforms, index, bucket, one, token, use_fsync=True)
            outcome = one.get()[1]
            if isinstance(outcome, Exception):
                written = outcome
                break
            written[index] = outcome  # type: ignore[index]
        results.put(written)


filesystem_async._get_write_results_queue = queue.Queue
torch_strategies.FileSystemWriterAsync = _InProcessWriter
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


def bytes_needed(parameters: int) -> int:
    """Size of a checkpoint: weights as they train, fp32 master copy, two fp32 moments (bounded by 16 B each)."""
    return 16 * parameters


def save(engine: Engine, final: Path, state: dict[str, Any], parameters: int) -> None:
    """Write a checkpoint aside and publish it as `final`; all ranks return or raise alike.

    Raises CheckpointError (disk full, permissions, ...); then `final` is as it was before.
    """
    _save(lambda: _sharded_state(engine, is_loading=False), final, state, bytes_needed(parameters))


def save_model(gpt: GPTModel, final: Path, state: dict[str, Any]) -> None:
    """Like `save`, weights only: enough for `load_model` and to start a run from."""
    weights_bytes = sum(parameter.nbytes for parameter in gpt.parameters())
    _save(lambda: {"model": _sharded_model(gpt)}, final, state, weights_bytes)


def _save(
    describe: Callable[[], dict[str, Any]], final: Path, state: dict[str, Any], size_bytes: int
) -> None:
    writing = final.parent / f"{on_disk.WRITING}{final.name}"
    with together(f"preparing to save {final}", only_rank=0) as mine:
        if mine:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(writing, ignore_errors=True)
            _require_space(final.parent, size_bytes)
            writing.mkdir()
    try:
        _save_tensors(describe, writing)
        with together(f"saving {final}", only_rank=0) as mine:
            if mine:
                on_disk.write_json(writing / on_disk.STATE, {"format": on_disk.FORMAT, **state})
                names = [file.name for file in writing.iterdir()]
                on_disk.publish(writing, final, on_disk.describe_files(writing, names))
    except CheckpointError:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
        raise


def _save_tensors(describe: Callable[[], dict[str, Any]], writing: Path) -> None:
    strategy = torch_strategies.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        dist_checkpointing.save(describe(), str(writing), strategy, content_metadata=_METADATA)
        error = None
    except (Exception, CheckpointException) as exception:
        error = exception
    with together("writing tensors"):
        if error is not None:
            where = f"writing tensors to {writing.parent} failed"
            raise CheckpointError(
                f"{where}: {_disk_or(_reason(error))}; earlier checkpoints are intact"
            ) from error


def _reason(error: BaseException) -> str:
    """One line for a person: torch wraps the cause of a failed rank in a BaseException with a traceback as text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _disk_or(reason: str) -> str:
    """torch's zip writer hides the errno of a write that fell short."""
    if "inline_container" in reason:
        return (
            f"a file could not be written to its end, the disk is full or limits the size of files ({reason})"
        )
    return reason


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 1e6:,.1f} MB free and a checkpoint needs up to {needed / 1e6:,.1f} MB; "
            "free space there or set run_dir to another disk (earlier checkpoints are intact)"
        )


def load(engine: Engine, checkpoint: Checkpoint, *, optimizer: bool = True) -> None:
    """Fill the engine from a checkpoint written at any layout; nothing is changed if it does not fit."""
    if optimizer:
        _require_form(checkpoint, engine.recipe.parallel.distributed_optimizer)
    loaded = _load(lambda: _sharded_state(engine, True, optimizer), checkpoint.path)
    for gpt, weights in zip(engine.gpts, loaded["model"], strict=True):
        _fill(gpt, weights)
    if optimizer:
        load_optimizer_state(engine.optimizer, loaded["optimizer"])
    else:
        engine.optimizer.reload_model_params()


def _require_form(checkpoint: Checkpoint, distributed: bool) -> None:
    """A sharded optimizer and a replicated one are stored differently."""
    found = checkpoint.state.get("layout", {}).get("distributed_optimizer", distributed)
    if found != distributed:
        raise CheckpointError(
            f"{checkpoint.path} was written with parallel.distributed_optimizer {str(found).lower()}, the recipe says "
            f"{str(distributed).lower()}, and one cannot be loaded as the other; set it back"
        )


def load_model(gpt: GPTModel, checkpoint: Checkpoint) -> None:
    """Fill a model that has no optimizer, such as one to be exported."""
    _fill(gpt, _load(lambda: {"model": _sharded_model(gpt)}, checkpoint.path)["model"])


def _fill(gpt: GPTModel, weights: dict[str, Any]) -> None:
    """Every weight must be there; Transformer Engine's extra states (FP8 scaling history) are not saved."""
    missing, unexpected = gpt.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if not name.endswith("_extra_state")] + unexpected
    if wrong:
        raise CheckpointError(
            f"the checkpoint and the model differ in {len(wrong)} weights, the first is {wrong[0]}"
        )


def _load(describe: Callable[[], dict[str, Any]], path: Path) -> dict[str, Any]:
    with together(f"checking {path}"):
        check_metadata(path)
    loaded: dict[str, Any] = {}
    error: BaseException | None = None
    try:
        loaded = dist_checkpointing.load(describe(), str(path))
    except (Exception, CheckpointException) as exception:
        error = exception
    with together(f"loading {path}"):
        if error is not None:
            raise CheckpointError(f"loading {path} failed: {_reason(error)}") from error
    return loaded


def _sharded_state(engine: Engine, is_loading: bool, optimizer: bool = True) -> dict[str, Any]:
    """megatron-core's description of this rank's tensors inside the whole."""
    model = [_sharded_model(gpt) for gpt in engine.gpts]
    state: dict[str, Any] = {"model": model}
    if optimizer:
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=_METADATA
        )
    return state


def _sharded_model(gpt: GPTModel) -> dict[str, Any]:
    """The model's part of it; objects (pickles: Transformer Engine's extra states) are left out."""
    described = gpt.sharded_state_dict(metadata=_METADATA)
    return {name: value for name, value in described.items() if not isinstance(value, ShardedObject)}
