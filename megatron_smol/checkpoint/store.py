"""Save and load an Engine through megatron-core's distributed checkpoints, whatever the layout.

Tensors go through `dist_checkpointing` in the `fully_reshardable` form, so that a checkpoint written at
DP 2 loads at TP 2. Everything that is not a tensor is in state.json (see checkpoint/folder.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smol.checkpoint.agree import together
from megatron_smol.checkpoint.folder import Checkpoint
from megatron_smol.checkpoint.own_part import reading_own_part
from megatron_smol.checkpoint.safe import check_metadata
from megatron_smol.checkpoint.saving import METADATA, Saving, reason_of
from megatron_smol.checkpoint.staging import Staging, copy_described, shards_of
from megatron_smol.errors import CheckpointError
from megatron_smol.model.emulated_fp8 import AMAX_HISTORY
from megatron_smol.train.optim import load_optimizer_state
from megatron_smol.train.step import Engine


def begin_save(
    engine: Engine,
    final: Path,
    state: dict[str, Any],
    size_bytes: int,
    staging: Staging,
    on_published: Callable[[], None] = lambda: None,
) -> Saving:
    """Copy this moment and start to write it as `final`; training may go on at once (see checkpoint/saving.py).

    size_bytes: what it needs at most (recipe/estimate.py). One save at a time: the copies lie in `staging`, which the next
    one uses again. Raises CheckpointError on all ranks alike (disk full, permissions, ...); then `final` is as it was before.
    """
    return Saving(lambda: _copied_state(engine, staging), final, state, size_bytes, on_published)


def save(engine: Engine, final: Path, state: dict[str, Any], size_bytes: int) -> None:
    """The same, returning when it is published."""
    begin_save(engine, final, state, size_bytes, Staging()).finish()


def save_model(gpt: GPTModel, final: Path, state: dict[str, Any]) -> None:
    """Like `save`, weights only: enough for `load_model` and to start a run from."""
    weights_bytes = sum(parameter.nbytes for parameter in gpt.parameters())
    Saving(lambda: ({"model": _sharded_model(gpt)}, lambda: None), final, state, weights_bytes).finish()


def _copied_state(engine: Engine, staging: Staging) -> tuple[dict[str, Any], Callable[[], None]]:
    """Description of copies of this rank's tensors, and what completes them in the writing thread."""
    for part in engine.parts:
        # The updated weights may still be with the ranks that own them.
        if part.ddp_config.overlap_param_gather:
            part.start_param_sync(force_sync=True)
    with staging.copying(), ExitStack() as stack:
        shards = shards_of(engine.optimizer, staging)
        for one in shards:
            stack.enter_context(one.standing_in())
        described = _sharded_state(engine, is_loading=False)
        copy_described(described["model"], staging, "model", shards)
        if not shards:
            copy_described(described["optimizer"], staging, "optimizer", shards)

    def complete() -> None:
        staging.wait()
        for one in shards:
            one.gather()

    return described, complete


def load(engine: Engine, checkpoint: Checkpoint, *, optimizer: bool = True) -> None:
    """Fill the engine from a checkpoint written at any layout; nothing is changed if it does not fit."""
    if optimizer:
        _require_form(checkpoint, engine.recipe.parallel.distributed_optimizer)
    with reading_own_part(engine.optimizer):
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
    wrong = [name for name in missing if not name.endswith(("_extra_state", AMAX_HISTORY))] + unexpected
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
        described = describe()
        _leave_out_absent_histories(described["model"], path)
        loaded = dist_checkpointing.load(described, str(path), validate_access_integrity=False)
    except (Exception, CheckpointException) as exception:
        error = exception
    with together(f"loading {path}"):
        if error is not None:
            raise CheckpointError(f"loading {path} failed: {reason_of(error)}") from error
    return loaded


def _leave_out_absent_histories(models: Any, path: Path) -> None:
    """A checkpoint of another precision has no scaling history: it starts empty, as at the first step."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    for model in models if isinstance(models, list) else [models]:
        for name in [name for name in model if name.endswith(AMAX_HISTORY)]:
            if model[name].key not in stored:
                del model[name]


def _sharded_state(engine: Engine, is_loading: bool, optimizer: bool = True) -> dict[str, Any]:
    """megatron-core's description of this rank's tensors inside the whole."""
    model = [_sharded_model(gpt) for gpt in engine.gpts]
    state: dict[str, Any] = {"model": model}
    if optimizer:
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=METADATA
        )
    return state


def _sharded_model(gpt: GPTModel) -> dict[str, Any]:
    """The model's part of it; objects (pickles: Transformer Engine's extra states) are left out."""
    described = gpt.sharded_state_dict(metadata=METADATA)
    return {name: value for name, value in described.items() if not isinstance(value, ShardedObject)}
