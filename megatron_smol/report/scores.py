"""The charts of evaluations: a task each, over tokens, with SmolLM2's own figures where the task is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_smol.report import paper
from megatron_smol.report.charts import Chart, Line
from megatron_smol.report.collect import RunRecord
from megatron_smol.report.evals import Evals, Evaluated
from megatron_smol.report.style import stage_colours
from megatron_smol.report.training import DASH, RUN_COLOURS, TOKENS, marks, span

PAPER_COLOUR = "#8a6d1d"


def score_charts(runs: Sequence[RunRecord], evals: Sequence[Evals | None]) -> list[Chart]:
    """A chart a task that models of a stage were asked."""
    tasks: dict[str, str] = {}
    for one in evals:
        if one:
            tasks |= {t: m for t, m in one.metrics.items() if any(t in e.figures for e in one.over_tokens)}
    return [_chart(runs, evals, task, metric) for task, metric in tasks.items()]


def _chart(runs: Sequence[RunRecord], evals: Sequence[Evals | None], task: str, metric: str) -> Chart:
    lines: list[Line] = []
    for run, one in zip(runs, evals, strict=True):
        models = [model for model in one.over_tokens if task in model.figures] if one else []
        lines += _lines(runs, run, models, task)
    low, high = span(runs)
    # The paper's questions were asked without a chat template after each stage.
    if not any(one and one.instruct for one in evals) and (points := paper.stage_points(task)):
        x = [share * high for share in points[0]]
        label = f"{paper.STAGE_MODEL} (paper)"
        lines.append(Line(label, x, points[1], PAPER_COLOUR, dots=True, dash=(2, 3), width=1.2))
    return Chart(
        f"{task} over tokens",
        lines,
        TOKENS,
        f"{metric} (share of 1)",
        marks=marks(runs),
        x_range=(low, high),
        height=230,
        title=task,
    )


def _lines(runs: Sequence[RunRecord], run: RunRecord, models: list[Evaluated], task: str) -> list[Line]:
    """The trunk as one line; every model of a branch with a dashed line from the one it continues."""
    several = len(runs) > 1
    run_colour = RUN_COLOURS[runs.index(run) % len(RUN_COLOURS)]
    group = run.label if several else "trunk"
    trunk = [model for model in models if model.stage and not model.stage.is_branch]
    lines = []
    if trunk:
        lines.append(_line(group, trunk, task, run_colour, group=group))
    for model in models:
        if model.stage is None or not model.stage.is_branch:
            continue
        before = [model.before] if model.before and task in model.before.figures else []
        its: dict[str, Any] = {"group": group, "named": not lines} if several else {"group": model.stage.name}
        label = f"{group}: {model.stage.name}" if several else model.stage.name
        if not several and any(line.group == model.stage.name for line in lines):
            its["named"] = False
        colour = run_colour if several else stage_colours(run)[model.stage.name]
        lines.append(_line(label, [*before, model], task, colour, dash=DASH, **its))
    return lines


def _line(label: str, models: list[Evaluated], task: str, colour: str, **more: Any) -> Line:
    figures = [model.figures[task] for model in models]
    x = [model.tokens for model in models]
    errors = [figure[1] or 0.0 for figure in figures]
    return Line(label, x, [figure[0] for figure in figures], colour, dots=True, errors=errors, **more)
