"""The run that is to be rebalanced: its recipe with the stage to come, planned with the sizes that the run found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.errors import DataError, UserError, nearest
from megatron_smol.rebalance.diff import append_stage
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.mixture import mixture_text
from megatron_smol.recipe.plan import Plan, StagePlan, make_plan, resolve_sizes
from megatron_smol.recipe.schema import Recipe
from megatron_smol.slurm.legs import last_rows


@dataclass(frozen=True)
class Subject:
    """original: the recipe file as it is; text: with the stage to come, which may be new."""

    folder: Path
    recipe_path: Path
    original: str
    text: str
    plan: Plan
    stage: StagePlan

    @property
    def is_new(self) -> bool:
        return self.text != self.original


def open_subject(folder: Path, stage: str, tokens: str | None, recipe_path: Path | None) -> Subject:
    """`tokens`: length of a stage that the recipe does not have yet. Raises UserError, DataError."""
    path = recipe_path or folder / "recipe.yaml"
    planned = _plan_json(folder)
    try:
        original = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the recipe {path} cannot be read ({error.strerror}); name it with --recipe"
        ) from None
    text, recipe = original, parse_recipe(original, str(path))
    names = [own.name for own in recipe.stages]
    if stage not in names:
        if tokens is None:
            raise UserError(
                f"{path} has no stage '{stage}'; {nearest(stage, names)}, or give --tokens to add one"
            )
        last = [own for own in recipe.stages if own.from_ is None][-1]
        text = append_stage(original, stage, tokens, mixture_text(last.mixture), str(path))
        recipe = parse_recipe(text, str(path))
    elif tokens is not None:
        raise UserError(f"{path} already says how long stage '{stage}' is; leave --tokens out")
    plan = make_plan(recipe, _sizes(recipe, planned))
    subject = Subject(folder, path, original, text, plan, plan.stage(stage))
    if subject.stage.foreign_order is not None:
        raise UserError(f"stage '{stage}' reads in the order of an older run: its weights cannot be changed")
    _require_not_begun(folder, subject.stage)
    return subject


def _plan_json(folder: Path) -> dict[str, Any]:
    path = folder / "plan.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no run folder: it has no plan.json; give the run_dir of a recipe that was trained"
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; `smol train` writes it anew") from None
    return found


def _sizes(recipe: Recipe, planned: dict[str, Any]) -> dict[str, int]:
    """What the run found on its disk, which may not be this machine's; other sources from here."""
    known = {name: int(source["tokens"]) for name, source in planned.get("sources", {}).items()}
    new = {name: source for name, source in recipe.sources.items() if name not in known}
    found = resolve_sizes(recipe.model_copy(update={"sources": new})) if new else {}
    return {name: known.get(name) or found[name] for name in recipe.sources}


def _require_not_begun(folder: Path, stage: StagePlan) -> None:
    rows = last_rows(folder / "metrics.jsonl")
    if rows and rows[-1]["stage_index"] >= stage.index:
        raise UserError(
            f"{folder} has come to stage '{rows[-1]['stage']}' already; only a stage that has not begun can be rebalanced: "
            f"name a later one, or branch off from an earlier stage (stages[].from)"
        )
