"""Where a run stands: what a checkpoint says besides tensors, and whether it is this run's.

`TrainState` is small and exact; with the plan it fixes everything that follows.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_smol.checkpoint.folder import Checkpoint, fsync, list_checkpoints
from megatron_smol.data.ledger import Ledger
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.recipe.load import dump_recipe, load_recipe
from megatron_smol.recipe.plan import Plan
from megatron_smol.recipe.schema import Recipe
from megatron_smol.slurm.legs import append_row
from megatron_smol.train.incidents import INCIDENTS

# Settings that may change between legs of a run: none of them moves the data or the weights.
FREE = ("run_dir", "parallel", "save", "guard", "tail", "eval", "data.over_epochs")
FREE_ANYWHERE = ("micro_batch", "path", "cache", "max_epochs")


@dataclass
class TrainState:
    """A moment of the run: `step` completed lineage steps, inside (or at the end of) a stage."""

    stage_index: int
    step: int
    ledger: Ledger
    hooks: dict[str, Any] = field(default_factory=dict)

    @property
    def progress(self) -> tuple[int, int]:
        return self.stage_index, self.step

    def to_json(
        self, plan: Plan, layout: dict[str, Any], data: dict[str, Any], tokenizer_sha256: str | None
    ) -> dict[str, Any]:
        """What state.json of a checkpoint holds. data: `TokenSource.identity` of every source."""
        stage, recipe = plan.stages[self.stage_index], plan.recipe
        return {
            "run": recipe.name,
            "stage": stage.name,
            "stage_index": self.stage_index,
            "step": self.step,
            "tokens": stage.tokens_at(self.step),
            "seq_length": stage.seq_length,
            "rope_base": stage.rope_base,
            "precision": stage.precision,
            "model": recipe.model.model_dump(),
            "tokenizer": recipe.tokenizer,
            "tokenizer_sha256": tokenizer_sha256,
            "data": data,
            "layout": layout,
            "ledger": self.ledger.to_json(),
            "hooks": self.hooks,
            "versions": versions(),
        }

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, plan: Plan, data: dict[str, Any]) -> TrainState:
        """Read a checkpoint of this run; CheckpointError when it is another model's or its data changed."""
        state = checkpoint.state
        require_model(checkpoint, plan.recipe)
        for name, then in state["data"].items():
            now = data.get(name)
            if now != then:
                raise CheckpointError(
                    f"source '{name}' is not what it was when {checkpoint.path} was written: {_data(now)} now, "
                    f"{_data(then)} then; restore it, or start a new run_dir"
                )
        stage = plan.stage(checkpoint.stage)
        ledger = Ledger.from_json(state["ledger"])
        ledger.check(plan, stage.name, (checkpoint.step - stage.start_step) * stage.global_batch)
        return cls(stage.index, checkpoint.step, ledger, state["hooks"])


def _data(identity: dict[str, Any] | None) -> str:
    if identity is None:
        return "not in the recipe"
    return f"{identity['tokens']:,} tokens, content {str(identity['sha256'])[:12]}"


def require_model(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a checkpoint of another model, naming the first field that differs."""
    for name, wanted in recipe.model.model_dump().items():
        found = checkpoint.state["model"].get(name)
        if found != wanted:
            raise CheckpointError(
                f"{checkpoint.path} is of another model: its {name} is {found}, the recipe's model.{name} is "
                f"{wanted}; use that checkpoint's own recipe, or another run_dir"
            )


def open_run_folder(recipe: Recipe) -> None:
    """Record the resolved recipe in the run folder, or check that the run begun there is this one.

    Stages may be appended to a run (an ablation that branches off it, say) as long as they leave the page
    length, and so the order of the data, alone. A run without a checkpoint holds nothing to protect.
    """
    path = recipe.run_path / "recipe.yaml"
    published = list_checkpoints(recipe.run_path / "checkpoints")
    if path.is_file() and published:
        before, now = _fixed_settings(_begun_with(path)), _fixed_settings(recipe)
        changed = [key for key, value in before.items() if now.get(key) != value]
        changed += [key for key in now if key not in before and not _is_appended(key, before)]
        for key in changed:
            if not (_is_lr(key) and recipe.guard.lr_may_change):
                hint = " (or allow it: guard.lr_may_change=true)" if _is_lr(key) else ""
                raise UserError(
                    f"{recipe.run_path} holds a run whose {key} is {before.get(key)}, this recipe says "
                    f"{now.get(key)}; set it back to continue that run{hint}, or choose another run_dir"
                )
        if changed:
            _record_changes(recipe, published[-1], {key: (before.get(key), now.get(key)) for key in changed})
    recipe.run_path.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_recipe(recipe))


def _begun_with(path: Path) -> Recipe:
    try:
        return load_recipe(path)
    except UserError as error:
        raise UserError(
            f"{error}. That file is what this run began with; if it was damaged and the recipe you gave is the same, remove it"
        ) from error


def _is_appended(key: str, before: dict[str, Any]) -> bool:
    """Whether a setting is of a stage or a source that the run did not have; a stage that reads it has changed by itself."""
    kind, _, rest = key.partition(".")
    if kind == "sources":
        return not any(known.startswith(f"sources.{rest.split('.')[0]}.") for known in before)
    names = {name for place, name in before.items() if place.startswith("stages[")}
    return kind.startswith("stages[") or (kind == "stages" and rest.split(".")[0] not in names)


def _is_lr(key: str) -> bool:
    return "lr" in key.split(".")


def _record_changes(recipe: Recipe, newest: Checkpoint, changed: dict[str, tuple[Any, Any]]) -> None:
    told = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
    reason = f"the learning rate was changed after {newest.path.name}: {told}"
    print(f"!! {reason}", flush=True)
    place = {"stage": newest.stage, "stage_index": newest.progress[0], "step": newest.step}
    what = {"what": "recipe changed", "decision": "note", "lasting": True, "reason": reason}
    append_row(recipe.run_path / INCIDENTS, place | what)


def _fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted name, without those that may change during a run."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, list | tuple):
            items = [
                (str(v.get("name", i)) if isinstance(v, dict) else str(i), v) for i, v in enumerate(value)
            ]
        else:
            flat[prefix] = value
            return
        for key, inner in items:
            name = f"{prefix}.{key}" if prefix else key
            if name not in FREE and key not in FREE_ANYWHERE:
                walk(name, inner)

    walk("", recipe.model_dump(mode="json", by_alias=True))
    flat["data.page_length"] = recipe.page_length
    for position, stage in enumerate(recipe.stages):
        flat[f"stages[{position}].name"] = stage.name
    trunk = [stage.name for stage in recipe.stages if stage.from_ is None]
    flat["last stage of the trunk"] = trunk[-1]  # the LR's decay ends with it
    return flat


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old one or the new one, after a power cut too."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text)
    fsync(aside)
    aside.replace(path)
    fsync(path.parent)


def versions() -> dict[str, str]:
    """What this run was made with, and on what."""
    names = ("megatron-smol", "megatron-core", "torch", "transformers", "transformer-engine", "numpy")
    return {name: _version(name) for name in names} | {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
