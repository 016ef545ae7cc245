"""What is known: ablations that started from the run, its evaluations by category, its validation losses at stage ends.

Only ablations tell what a source does: between the stages of a run the mixture changes together with everything else.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.ablate.config import CONTROL
from megatron_smol.ablate.contrast import CLEAR_P
from megatron_smol.ablate.results import RESULTS, lower_is_better
from megatron_smol.errors import DataError, UserError
from megatron_smol.evals.compare import Delta, Side, compare
from megatron_smol.evals.results import Row, load_rows, newest
from megatron_smol.evals.target import RESULTS as EVALS
from megatron_smol.recipe.plan import Plan
from megatron_smol.report.collect import read_rows

# As the SmolLM2 paper groups its tables; what is not named is knowledge and reasoning.
CATEGORIES = {
    "instructions": "ifeval|mt_bench",
    "maths": "gsm|math|aime|svamp",
    "code": "humaneval|mbpp|multipl",
    "generative": "coqa|drop|jeopardy|squad|trivia",
}
_OTHER = "knowledge and reasoning"


@dataclass(frozen=True)
class Arm:
    """A candidate of an ablation. shift: source -> its weight minus the control's; improvement: of rank_by relative to the
    control's value, positive is better; error: its standard error; p as in the ablation's table; both None with one seed."""

    candidate: str
    share: float | None
    shift: dict[str, float]
    difference: float
    difference_error: float | None
    improvement: float
    error: float | None
    p: float | None

    @property
    def is_clear(self) -> bool:
        return self.p is not None and self.p < CLEAR_P


@dataclass(frozen=True)
class AblationResult:
    """means: (weights, metric -> mean over seeds) of every arm of the largest budget, the control included."""

    folder: Path
    name: str
    rank_by: str
    budget: int  # tokens
    arms: tuple[Arm, ...]
    means: tuple[tuple[dict[str, float], dict[str, float]], ...]


@dataclass(frozen=True)
class Evaluated:
    """One task at the newest evaluated stage end. change: from the stage end before it, None for the first."""

    category: str
    task: str
    stage: str
    value: float
    error: float | None
    change: Delta | None


@dataclass(frozen=True)
class Evidence:
    """validation: (stage, source -> nats per token at its end), in the order of training."""

    ablations: tuple[AblationResult, ...]
    evaluations: tuple[Evaluated, ...]
    validation: tuple[tuple[str, dict[str, float]], ...]


def gather(folder: Path, plan: Plan, ablations: list[Path]) -> Evidence:
    """All of it. `ablations`: output folders to read besides those beside the run that started from it."""
    given = [read_ablation(path) for path in ablations]
    known = {path.resolve() for path in ablations}
    found = [read_ablation(path) for path in _beside(folder) if path.resolve() not in known]
    ends = [
        (str(row["stage"]), {name: float(loss) for name, loss in row["losses"].items()})
        for row in read_rows(folder / "validation.jsonl")
        if row["when"] == "end"
    ]
    return Evidence((*given, *found), tuple(_evaluations(folder, plan)), tuple(ends))


def _beside(folder: Path) -> list[Path]:
    """Folders next to the run folder with results of an ablation that started from it."""
    paths = []
    for file in sorted(folder.resolve().parent.glob(f"*/{RESULTS}")):
        start = _load(file).get("started_from")
        if start and Path(start["run"]).resolve() == folder.resolve():
            paths.append(file.parent)
    return paths


def read_ablation(folder: Path) -> AblationResult:
    """The largest budget of an ablation. UserError when there is none, DataError when it cannot be read."""
    file = folder / RESULTS
    if not file.is_file():
        raise UserError(
            f"{folder} has no {RESULTS}; give the output folder of an ablation that `smol ablate` has run"
        )
    found = _load(file)
    try:
        content, cells, rank_by, name = (found[key] for key in ("content", "cells", "rank_by", "name"))
        budget = max(content[arm]["budget"] for arm in found["arms"])
        names = [arm for arm in found["arms"] if content[arm]["budget"] == budget]
        arms = [_arm(arm, content, cells, rank_by) for arm in names if content[arm]["control"] in names]
        means = [
            (content[arm]["weights"], {m: cell["mean"] for m, cell in cells[arm].items() if cell["values"]})
            for arm in names
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is damaged or of an older version ({type(error).__name__}: {error}); write it again with "
            "smol ablate CONFIG --results"
        ) from error
    return AblationResult(folder, name, rank_by, budget, tuple(arms), tuple(means))


def _load(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{file} is damaged: {error}; write it again with smol ablate CONFIG --results"
        ) from None
    return found if isinstance(found, dict) else {}


def _arm(name: str, content: dict[str, Any], cells: dict[str, Any], rank_by: str) -> Arm:
    own, control = content[name], content[content[name]["control"]]
    assert own["candidate"] != CONTROL
    cell, base = cells[name][rank_by], cells[content[name]["control"]][rank_by]["mean"]
    sources = own["weights"].keys() | control["weights"].keys()
    shift = {s: own["weights"].get(s, 0.0) - control["weights"].get(s, 0.0) for s in sorted(sources)}
    sign = -1 if lower_is_better(rank_by) else 1
    error = cell["difference_error"]
    scale = abs(base) or 1.0
    return Arm(
        own["candidate"],
        own["share"],
        shift,
        cell["difference"],
        error,
        sign * cell["difference"] / scale,
        None if error is None else error / scale,
        cell["p"],
    )


def category_of(task: str) -> str:
    """Of an evaluation's task, by its name."""
    return next((name for name, words in CATEGORIES.items() if re.search(words, task.lower())), _OTHER)


def _evaluations(folder: Path, plan: Plan) -> list[Evaluated]:
    """The tasks of the newest evaluated stage end, each against the stage end evaluated before."""
    results = folder / EVALS
    ends = {(stage.name, stage.end_step): stage for stage in plan.trunk}
    rows_at: dict[str, list[Row]] = {}
    for row in load_rows(results):
        if (row["stage"], row["step"]) in ends:
            rows_at.setdefault(row["stage"], []).append(row)
    stages = [stage.name for stage in plan.trunk if stage.name in rows_at]
    if not stages:
        return []
    sides = [Side(name, results, newest(rows_at[name])) for name in stages]
    changes = _changes(*sides[-2:]) if len(sides) > 1 else {}
    return [
        Evaluated(category_of(task), task, stages[-1], figure["value"], figure["stderr"], changes.get(task))
        for task, row in sides[-1].rows.items()
        for figure in (row["metrics"][row["metric"]],)
    ]


def _changes(before: Side, after: Side) -> dict[str, Delta]:
    try:
        return {delta.task: delta for delta in compare(before, after)}
    except UserError:  # no task in common
        return {}
