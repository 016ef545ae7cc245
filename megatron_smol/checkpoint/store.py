"""Save and load an Engine through megatron-core's distributed checkpoints, whatever the layout.

Tensors go through `dist_checkpointing` in the `fully_reshardable` form, so that a checkpoint written at
DP 2 loads at TP 2. Everything that is not a tensor is in state.json (see checkpoint/folder.py).
"""

from __future__ import annotations

import logging
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

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
    writing = final.parent / f"{on_disk.WRITING}{final.name}"
    with together(f"preparing to save {final}", only_rank=0) as mine:
        if mine:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(writing, ignore_errors=True)
            _require_space(final.parent, bytes_needed(parameters))
            writing.mkdir()
    try:
        _save_tensors(engine, writing)
        with together(f"saving {final}", only_rank=0) as mine:
            if mine:
                on_disk.write_json(writing / on_disk.STATE, {"format": on_disk.FORMAT, **state})
                names = [file.name for file in writing.iterdir()]
                on_disk.publish(writing, final, on_disk.describe_files(writing, names))
    except CheckpointError:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
        raise


def _save_tensors(engine: Engine, writing: Path) -> None:
    tensors = _sharded_state(engine, is_loading=False)
    strategy = torch_strategies.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        dist_checkpointing.save(tensors, str(writing), strategy, content_metadata=_METADATA)
    except Exception as error:  # raised on all ranks by megatron-core, with a text on the failing one only
        with together(f"writing tensors to {writing.parent}"):
            raise
        raise AssertionError from error


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 1e6:,.1f} MB free and a checkpoint needs up to {needed / 1e6:,.1f} MB; "
            "free space there or set run_dir to another disk (earlier checkpoints are intact)"
        )


def load(engine: Engine, checkpoint: Checkpoint, *, optimizer: bool = True) -> None:
    """Fill the engine from a checkpoint written at any layout; nothing is changed if it does not fit."""
    path = checkpoint.path
    with together(f"checking {path}"):
        check_metadata(path)
    with together(f"loading {path}"):
        try:
            loaded = dist_checkpointing.load(_sharded_state(engine, True, optimizer), str(path))
        except Exception as error:
            raise CheckpointError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    engine.gpt.load_state_dict(loaded["model"])
    if optimizer:
        load_optimizer_state(engine.optimizer, loaded["optimizer"])
    else:
        engine.optimizer.reload_model_params()


def _sharded_state(engine: Engine, is_loading: bool, optimizer: bool = True) -> dict[str, Any]:
    """megatron-core's description of this rank's tensors inside the whole, objects (pickles) left out."""
    model = {
        name: value
        for name, value in engine.gpt.sharded_state_dict(metadata=_METADATA).items()
        if not isinstance(value, ShardedObject)
    }
    state: dict[str, Any] = {"model": model}
    if optimizer:
        state["optimizer"] = engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    return state
