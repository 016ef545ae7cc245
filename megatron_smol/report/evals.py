"""Evaluations of a run in its report: what each model scored, and what each stage, SFT and DPO changed.

`smol eval RUN --stages` writes RUN/evals.jsonl; a run without it has no such section. The changes are those of
`smol eval --compare`, each model against the one it continues. `scores` draws them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_smol.errors import UserError
from megatron_smol.evals.compare import Delta, Side, compare
from megatron_smol.evals.results import Row, load_rows, newest
from megatron_smol.evals.target import RESULTS
from megatron_smol.report.collect import RunRecord, StageRun

TAIL = ("hf", "sft", "dpo")  # folders of a run, each made from the one before it
_VERDICTS = {"better": "good", "worse": "bad", "within noise": "", "unknown": "warn"}  # classes of the page


@dataclass(frozen=True)
class Evaluated:
    """One model with its newest result of every task. before: the model that it continues, if that has results."""

    name: str  # stage and step, or the folder of the tail
    side: Side
    tokens: int | None
    stage: StageRun | None
    before: Evaluated | None = None
    changes: tuple[Delta, ...] = ()

    @property
    def figures(self) -> dict[str, tuple[float, float | None, int]]:
        """By task: value, standard error, questions."""
        return {
            task: (figure["value"], figure["stderr"], int(row["n"]))
            for task, row in self.side.rows.items()
            for figure in (row["metrics"][row["metric"]],)
        }


@dataclass(frozen=True)
class Evals:
    """All evaluated models of a run in the order of training, and the tasks with their metric."""

    run: RunRecord
    models: list[Evaluated]
    metrics: dict[str, str]  # task -> metric

    @property
    def over_tokens(self) -> list[Evaluated]:
        return [model for model in self.models if model.stage and model.tokens is not None]

    @property
    def tasks(self) -> list[str]:
        return list(self.metrics)

    @property
    def instruct(self) -> bool:
        """Whether everything was asked inside the chat template."""
        return all(row.get("chat_template") for model in self.models for row in model.side.rows.values())

    @property
    def table(self) -> list[tuple[str, list[Cell]]]:
        """For each model its figures, a cell a task."""
        return [(model.name, [_cell(model, task) for task in self.metrics]) for model in self.models]


@dataclass(frozen=True)
class Cell:
    """A figure and its change against the model before; verdict: a class of the page."""

    figure: str = ""
    change: str = ""
    verdict: str = ""


def _cell(model: Evaluated, task: str) -> Cell:
    if task not in model.figures:
        return Cell()
    value, error, _ = model.figures[task]
    figure = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    delta = next((delta for delta in model.changes if delta.task == task), None)
    if delta is None:
        return Cell(figure)
    return Cell(figure, f"{delta.b - delta.a:+.4f}", _VERDICTS[delta.verdict])


def collect_evals(run: RunRecord) -> Evals | None:
    """RUN/evals.jsonl, or None when nothing was evaluated."""
    results = run.folder / RESULTS
    rows = load_rows(results)
    if not rows:
        return None
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["fingerprint"], []).append(row)
    stages = {stage.name: stage for stage in run.stages}
    # Of two models of one name, an old export say, the one that was evaluated last.
    named = {model.name: model for its in by_model.values() for model in (_evaluated(results, its, stages),)}
    found = sorted(named.values(), key=lambda model: _order(model, run))
    linked: list[Evaluated] = []
    for model in found:
        linked.append(_with_changes(model, _before(model, linked, stages)))
    metrics = {task: row["metric"] for model in linked for task, row in model.side.rows.items()}
    return Evals(run, linked, metrics)


def _evaluated(results: Path, rows: list[Row], stages: dict[str, StageRun]) -> Evaluated:
    last = rows[-1]
    stage = stages.get(last["stage"] or "")
    name = f"{stage.name} step {last['step']:,}" if stage else Path(last["model"]).name
    return Evaluated(name, Side(name, results, newest(rows)), last["tokens"], stage)


def _order(model: Evaluated, run: RunRecord) -> tuple[int, int]:
    """Stages as they ran, then the tail, then other models."""
    if model.stage:
        return model.stage.index, model.tokens or 0
    return len(run.stages), TAIL.index(model.name) if model.name in TAIL else len(TAIL)


def _before(model: Evaluated, earlier: list[Evaluated], stages: dict[str, StageRun]) -> Evaluated | None:
    """The nearest evaluated model on the lineage; of the tail, the folder before it, else the last checkpoint."""
    if model.stage:
        return next(_ancestors(model, earlier, stages), None)
    if model.name not in TAIL[1:]:
        return None
    on_the_way = [m for m in earlier if m.name in TAIL or m.stage]
    return on_the_way[-1] if on_the_way else None


def _ancestors(
    model: Evaluated, earlier: list[Evaluated], stages: dict[str, StageRun]
) -> Iterator[Evaluated]:
    stage, limit = model.stage, model.tokens or 0
    while stage is not None:
        its = [m for m in earlier if m.stage is stage and (m.tokens or 0) <= limit]
        yield from reversed(its)
        limit, stage = min(limit, stage.start_tokens), stages.get(stage.parent or "")


def _with_changes(model: Evaluated, before: Evaluated | None) -> Evaluated:
    changes: list[Delta] = []
    if before is not None:
        try:
            changes = compare(before.side, model.side)
        except UserError:  # no task in common
            before = None
    return Evaluated(model.name, model.side, model.tokens, model.stage, before, tuple(changes))
