"""The charts of training: loss, learning rate, gradients, throughput, mixture and validation over tokens.

`RunRecord`s (one, or several to compare) -> `Chart`s. A page of one run has a colour for each stage, a page of
several one for each run; branches are dashed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_smol.report.charts import Chart, Line, Mark
from megatron_smol.report.collect import RunRecord, StageRun
from megatron_smol.report.downsample import binned, extremes, running_mean
from megatron_smol.report.health import Health
from megatron_smol.report.style import source_colours, stage_colours

MEAN_POINTS, FEWEST_POINTS = 900, 60  # along the whole axis a stage has its share of them
MIXTURE_COLUMNS = 240
STEPS_OF_A_LONG_RUN = 5_000
RUN_COLOURS = ("#1f5fa8", "#d9622b", "#1f8a70", "#8a4fbe", "#c23b6b", "#a67c00", "#4a5560", "#00a3b4")
TOKENS = "tokens along the lineage"
DASH = (5, 4)
_SYNC = "tokens"


def span(runs: Sequence[RunRecord]) -> tuple[float, float]:
    """The axis of tokens that all these runs share, as far as they are planned."""
    ends = [stage.end_tokens or stage.last_tokens for run in runs for stage in run.stages]
    return 0.0, float(max(ends, default=1) or 1)


def style_of(runs: Sequence[RunRecord], run: RunRecord, stage: StageRun) -> dict[str, Any]:
    """Label, group, colour and dash of a stage's line."""
    if len(runs) == 1:
        colour, group = stage_colours(run)[stage.name], stage.name
    else:
        colour, group = RUN_COLOURS[runs.index(run) % len(RUN_COLOURS)], run.label
    dash = DASH if stage.is_branch else ()
    return {"label": group, "group": group, "colour": colour, "dash": dash}


def _each(runs: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, StageRun, dict[str, Any]]]:
    """Every begun stage with its line's style; a group's first line is the one in the legend."""
    known: set[str] = set()
    for run in runs:
        for stage in run.begun:
            style = style_of(runs, run, stage)
            yield run, stage, style | {"named": style["group"] not in known}
            known.add(style["group"])


def marks(runs: Sequence[RunRecord], health: Sequence[Health] = ()) -> list[Mark]:
    """Where the trunk's stages begin (of one run), and the incidents."""
    found = []
    if len(runs) == 1:
        trunk = [stage for stage in runs[0].stages if not stage.is_branch]
        found = [Mark(stage.start_tokens, stage.name) for stage in trunk]
    for its in health:
        found += [Mark(i.tokens, i.decision, "incident") for i in its.incidents if i.tokens is not None]
    return found


def loss(runs: Sequence[RunRecord], health: Sequence[Health]) -> Chart:
    """Extremes of single steps, faint, under a running mean that begins where its parent stood."""
    low, high = span(runs)
    lines: list[Line] = []
    for run in runs:
        curves = {stage.name: _mean_points(stage, high) for stage in run.begun}
        half = max(2, sum(len(y) for _, y in curves.values()) // 150)
        smoothed: dict[str, tuple[Any, Any]] = {}
        for stage in run.begun:
            smoothed[stage.name] = _smooth(
                curves[stage.name], half, stage.start_tokens, smoothed.get(stage.parent or "")
            )
            style = style_of(runs, run, stage)
            named = all(line.group != style["group"] for line in lines)
            if len(runs) == 1:
                x, y = extremes(stage.series.tokens, stage.series.loss, low, high)
                faint = style | {"label": f"{stage.name}: single steps", "dash": ()}
                lines.insert(0, Line(x=x, y=y, width=0.8, alpha=0.35, named=False, **faint))
            lines.append(Line(x=smoothed[stage.name][0], y=smoothed[stage.name][1], named=named, **style))
    return Chart(
        "Training loss over tokens",
        lines,
        TOKENS,
        "training loss (nats per token)",
        marks=marks(runs, health),
        x_range=(low, high),
        y_range=_y_of_a_long_run(runs, lines),
        sync=_SYNC,
        height=340,
    )


def _mean_points(stage: StageRun, high: float) -> tuple[Any, Any]:
    share = (stage.last_tokens - stage.start_tokens) / high
    return binned(
        stage.series.tokens,
        stage.series.loss,
        max(FEWEST_POINTS, min(MEAN_POINTS, round(MEAN_POINTS * share))),
    )


def _smooth(curve: tuple[Any, Any], half: int, start: int, before: tuple[Any, Any] | None) -> tuple[Any, Any]:
    x, y = curve
    if before is None or not len(before[0]):
        return x, running_mean(y, half)
    inherited = float(np.interp(start, *before))
    mean = running_mean(np.concatenate([np.full(half, inherited), y]), half)[half:]
    return np.insert(x, 0, start), np.insert(mean, 0, inherited)


def _y_of_a_long_run(runs: Sequence[RunRecord], lines: list[Line]) -> tuple[float, float] | None:
    """Let the steep first steps of a long run leave the picture, so that the rest of it has room."""
    if max(sum(len(stage.series) for stage in run.begun) for run in runs) < STEPS_OF_A_LONG_RUN:
        return None
    means = [line.y for line in lines if line.alpha == 1.0 and len(line.y)]
    if not means:
        return None
    values = np.concatenate(means)
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def learning_rate(runs: Sequence[RunRecord]) -> Chart:
    """The rate of each step over the tokens where the step starts."""
    low, high = span(runs)
    lines = []
    for _, stage, style in _each(runs):
        series = stage.series
        starts = np.concatenate([[stage.start_tokens], series.tokens[:-1]])
        x, y = extremes(starts, series.lr, low, high, 400)
        # A finished stage's line ends with the rate that the plan gives there, where the next one begins.
        end = stage.settings.get("lr_end", series.lr[-1]) if stage.complete else series.lr[-1]
        lines.append(Line(x=np.append(x, series.tokens[-1]), y=np.append(y, end), **style))
    return Chart(
        "Learning rate over tokens",
        lines,
        TOKENS,
        "learning rate (per step)",
        marks=marks(runs),
        x_range=(low, high),
        from_zero=True,
        sync=_SYNC,
        height=200,
    )


def gradient_norm(runs: Sequence[RunRecord], health: Sequence[Health]) -> Chart:
    return _per_step(
        runs,
        lambda stage: stage.series.grad_norm,
        ("Gradient norm over tokens", "gradient norm (L2)"),
        marks(runs, health),
    )


def throughput(runs: Sequence[RunRecord]) -> Chart:
    return _per_step(
        runs,
        lambda stage: stage.series.tokens_per_s,
        ("Throughput over tokens", "throughput (tokens/s)"),
        marks(runs),
        y_format="tokens",
    )


def mfu(runs: Sequence[RunRecord], health: Sequence[Health]) -> Chart | None:
    """Model FLOPs utilisation, a stage's median; None where no GPU of the table ran."""
    lines = []
    by_run = {run.label: its.mfu for run, its in zip(runs, health, strict=True)}
    for run, stage, style in _each(runs):
        if (value := by_run[run.label].get(stage.name)) is not None:
            lines.append(Line(x=[stage.start_tokens, stage.last_tokens], y=[value, value], **style))
    if not lines:
        return None
    return Chart(
        "Model FLOPs utilisation over tokens",
        lines,
        TOKENS,
        "MFU (% of the bf16 peak)",
        y_format="percent",
        x_range=span(runs),
        from_zero=True,
        sync=_SYNC,
        height=200,
    )


def _per_step(
    runs: Sequence[RunRecord],
    values: Callable[[StageRun], Any],
    words: tuple[str, str],
    marked: list[Mark],
    y_format: Any = "number",
) -> Chart:
    """Extremes of single steps, faint, under means."""
    low, high = span(runs)
    lines: list[Line] = []
    for _, stage, style in _each(runs):
        x, y = extremes(stage.series.tokens, values(stage), low, high, 500)
        share = (stage.last_tokens - stage.start_tokens) / high
        mean = binned(stage.series.tokens, values(stage), max(20, round(150 * share)))
        faint = style | {"label": f"{style['label']}: single steps", "named": False, "dash": ()}
        lines.insert(0, Line(x=x, y=y, width=0.8, alpha=0.35, **faint))
        lines.append(Line(x=mean[0], y=mean[1], **style))
    means = np.concatenate([line.y for line in lines if line.alpha == 1.0 and len(line.y)] or [np.zeros(1)])
    top = 1.6 * float(np.quantile(means, 0.98)) or 1.0
    return Chart(
        words[0],
        lines,
        TOKENS,
        words[1],
        y_format=y_format,
        marks=marked,
        x_range=(low, high),
        y_range=(0.0, top),
        sync=_SYNC,
        height=220,
    )


def mixture(run: RunRecord, sync: bool = True) -> Chart:
    """Shares of the trunk's windows: drawn as areas, planned as dashed edges that should lie on theirs."""
    low, high = span([run])
    trunk = [stage for stage in run.stages if not stage.is_branch]
    colours = source_colours(run)
    x_drawn, drawn = _drawn_shares([s for s in trunk if s.begun], run.source_names, high)
    x_planned = [stage.start_tokens for stage in trunk] + [trunk[-1].end_tokens or trunk[-1].last_tokens]
    lines = []
    for name in run.source_names:
        planned = [stage.planned.get(name, {}).get("weight", 0.0) for stage in trunk]
        common: dict[str, Any] = {"group": name, "stepped": True}
        area = Line(name, x_drawn, drawn[name], colours[name], stack="drawn", fill=True, width=0.0, **common)
        edge: dict[str, Any] = {"width": 1.4, "dash": (4, 3), "named": False, "stack": "planned"}
        lines.append(area)
        if any(planned):
            told = Line(f"{name}, planned", x_planned, [*planned, planned[-1]], "#1f2933", **common, **edge)
            lines.append(told)
    return Chart(
        "Mixture over tokens, drawn against planned",
        lines,
        TOKENS,
        "share of the windows (%)",
        y_format="percent",
        marks=marks([run]),
        x_range=(low, high),
        y_range=(0.0, 1.0),
        sync=_SYNC if sync else "",
        height=300,
    )


def _drawn_shares(
    stages: list[StageRun], names: list[str], high: float
) -> tuple[list[float], dict[str, list[float]]]:
    """Shares in parts of each stage, at their first token; the last value holds to the end."""
    x: list[float] = []
    shares: dict[str, list[float]] = {name: [] for name in names}
    for stage in stages:
        part = (stage.last_tokens - stage.start_tokens) / high
        columns = max(1, min(round(MIXTURE_COLUMNS * part), len(stage.series) // 20 or 1))
        bounds = np.linspace(0, len(stage.series), columns + 1).astype(int)
        totals = np.zeros(columns)
        sums = {}
        for name, column in stage.series.drawn.items():
            sums[name] = np.add.reduceat(column, bounds[:-1])
            totals += sums[name]
        x += [stage.start_tokens, *stage.series.tokens[bounds[1:-1] - 1].tolist()]
        for name in names:
            shares[name] += (sums[name] / totals).tolist() if name in sums else [0.0] * columns
    if stages:
        x.append(stages[-1].last_tokens)
        for share in shares.values():
            share.append(share[-1])
    return x, shares


def validation(runs: Sequence[RunRecord]) -> list[Chart]:
    """Held-out loss over tokens: one chart with a line a source, or for several runs one chart a source."""
    names = list(dict.fromkeys(name for run in runs for name in run.source_names))
    names = [n for n in names if any(_validation_lines(runs, run, n) for run in runs)]
    if not names:
        return []
    if len(runs) == 1:
        lines = [line for name in names for line in _validation_lines(runs, runs[0], name)]
        return [_validation_chart(runs, lines, "", 320)]
    return [
        _validation_chart(
            runs, [line for run in runs for line in _validation_lines(runs, run, name)], name, 230
        )
        for name in names
    ]


def _validation_lines(runs: Sequence[RunRecord], run: RunRecord, source: str) -> list[Line]:
    """The trunk's line, and a dashed one a branch."""
    if len(runs) == 1:
        colour, group = source_colours(run)[source], source
    else:
        colour, group = RUN_COLOURS[runs.index(run) % len(RUN_COLOURS)], run.label
    trunk: list[tuple[float, float]] = []
    lines = []
    for stage in run.stages:
        points = [
            (at, stage.validation[when][source])
            for when, at in (("start", stage.start_tokens), ("end", stage.last_tokens))
            if source in stage.validation.get(when, {})
        ]
        if stage.is_branch and points:
            x, y = zip(*points, strict=True)
            lines.append(
                Line(f"{group}: {stage.name}", x, y, colour, group, dash=DASH, dots=True, named=False)
            )
        elif points:
            trunk += points
    if trunk:
        kept = dict(trunk)  # a stage's start is measured again where its windows differ: the newer one stands
        lines.insert(0, Line(group, list(kept), list(kept.values()), colour, group, dots=True))
    return lines


def _validation_chart(runs: Sequence[RunRecord], lines: list[Line], title: str, height: int) -> Chart:
    return Chart(
        "Validation loss over tokens",
        lines,
        TOKENS,
        "validation loss (nats per token)",
        marks=marks(runs),
        x_range=span(runs),
        sync=_SYNC,
        height=height,
        title=title,
    )
