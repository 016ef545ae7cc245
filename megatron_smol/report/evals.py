"""Evaluations of a run in its report: scores over tokens, and what each stage and SFT and DPO changed.

`smol eval RUN --stages` writes RUN/evals.jsonl; a run without it has no such section. The changes are those of
`smol eval --compare`, each model against the one it continues.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from megatron_smol.errors import UserError
from megatron_smol.evals.compare import BEYOND, Delta, Side, compare
from megatron_smol.evals.results import Row, load_rows, newest
from megatron_smol.evals.target import RESULTS
from megatron_smol.report.collect import RunRecord, StageRun
from megatron_smol.report.style import INK, MUTED, STYLE, Layout, inline_svg, short, stage_colours

TAIL = ("hf", "sft", "dpo")  # folders of a run, each made from the one before it
_VERDICTS = {"better": "#1f7a4d", "worse": "#b42318", "within noise": "#9aa5b1", "unknown": "#9a6700"}


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
    def changed(self) -> list[Evaluated]:
        return [model for model in self.models if model.changes]

    @property
    def table(self) -> list[tuple[str, list[str]]]:
        """For each model its figures, a cell a task."""
        return [
            (model.name, [_cell(model.figures.get(task)) for task in self.metrics]) for model in self.models
        ]


def _cell(figure: tuple[float, float | None, int] | None) -> str:
    if figure is None:
        return ""
    value, error, _ = figure
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


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


# --- pictures ----------------------------------------------------------------------------------------------


def scores(evals: Evals, layout: Layout) -> str:
    """A panel a task: score over tokens along the lineage, with one standard error to each side."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    models, colours = evals.over_tokens, stage_colours(evals.run)
    tasks = [task for task in evals.metrics if any(task in model.figures for model in models)]
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(layout, len(tasks), 2.0)
        for axes, task in zip(panels, tasks, strict=True):
            for model in models:
                if task in model.figures:
                    _draw_score(axes, model, task, colours)
            axes.set_title(
                f"{task} ({evals.metrics[task]})", size=9, fontweight="bold", loc="left", color=INK
            )
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.margins(x=0.08, y=0.12)
        figure.supxlabel("tokens along the lineage", size=9.5, color=MUTED)
        return inline_svg(figure, f"scores-{layout.name}", "Score of each task over tokens")


def _draw_score(axes: Any, model: Evaluated, task: str, colours: dict[str, str]) -> None:
    assert model.stage is not None
    colour, (value, error, _) = colours[model.stage.name], model.figures[task]
    if model.before and task in model.before.figures:
        x, y = [model.before.tokens, model.tokens], [model.before.figures[task][0], value]
        style = "--" if model.stage.is_branch else "-"
        axes.plot(x, y, style, color=colour, linewidth=1.2, alpha=0.6, zorder=2)
    axes.errorbar(
        model.tokens,
        value,
        yerr=error or None,
        fmt="o",
        color=colour,
        markersize=4.5,
        linewidth=1.0,
        zorder=3,
    )


def changes(evals: Evals, layout: Layout) -> str:
    """A panel a task: each model minus the one it continues, with the bar beyond which it is no noise."""
    models = evals.changed
    tasks = [task for task in evals.metrics if any(task == delta.task for m in models for delta in m.changes)]
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(layout, len(tasks), 0.24 * len(models) + 0.9, sharey=True)
        for axes, task in zip(panels, tasks, strict=True):
            for row, model in enumerate(models):
                for delta in (d for d in model.changes if d.task == task):
                    _draw_change(axes, row, delta)
            axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
            axes.set_title(task, size=9, fontweight="bold", loc="left", color=INK)
            axes.set_yticks(range(len(models)), [_label(model) for model in models])
            axes.set_ylim(len(models) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
            axes.spines["left"].set_visible(False)
            axes.locator_params(axis="x", nbins=4)
        figure.supxlabel("change of the score", size=9.5, color=MUTED)
        return inline_svg(figure, f"changes-{layout.name}", "Change of each score from model to model")


def _draw_change(axes: Any, row: int, delta: Delta) -> None:
    error = BEYOND * delta.stderr if delta.stderr is not None else None
    colour = _VERDICTS[delta.verdict]
    axes.errorbar(
        delta.b - delta.a, row, xerr=error, fmt="o", color=colour, markersize=5, linewidth=1.4, zorder=3
    )


def _label(model: Evaluated) -> str:
    return model.stage.name if model.stage else model.name


def _panels(layout: Layout, count: int, height: float, sharey: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(layout.columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(layout.width, rows * height + 0.3), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel())
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]
