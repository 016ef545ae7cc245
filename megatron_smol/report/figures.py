"""The report's pictures: each function turns a `RunRecord` into one inline SVG.

Every figure is drawn twice, for a wide page and for a phone (`Layout`); the page shows the one that fits.
With `style`, the only module that imports matplotlib.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_smol.report.collect import RunRecord, StageRun
from megatron_smol.report.style import (
    INK,
    MUTED,
    NARROW,
    STYLE,
    WIDE,
    Layout,
    inline_svg,
    is_dark,
    short,
    source_colours,
    stage_colours,
)

POINTS = 900  # along the whole axis, a stage has its share of them
FEWEST_POINTS = 60  # of a stage
STEPS_OF_A_LONG_RUN = 5_000


def training(run: RunRecord, layout: Layout) -> str:
    """The stage tree, the training loss and the learning rate over one axis of lineage tokens."""
    rows = len(run.stages)
    tree_height = 0.25 * rows + 0.1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(layout.width, tree_height + 5.2), layout="constrained")
        tree, loss, lr = figure.subplots(3, sharex=True, height_ratios=[tree_height, 3.4, 1.3])
        _draw_tree(tree, run, layout)
        colours = stage_colours(run)
        curves = {stage.name: _loss_curve(stage, run) for stage in run.begun}
        half = max(2, sum(len(y) for _, y in curves.values()) // 150)
        smoothed: dict[str, tuple[Any, Any]] = {}
        for stage in run.begun:
            before = smoothed.get(stage.parent or "")
            smoothed[stage.name] = _draw_loss(
                loss, curves[stage.name], half, stage.start_tokens, before, colours[stage.name]
            )
            _draw_lr(lr, stage, colours[stage.name])
        for axes in (loss, lr):
            for boundary in _trunk_boundaries(run):
                axes.axvline(boundary, color="#b8c2cc", linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        _limit_loss(loss, run)
        loss.set_ylabel("training loss (nats per token)")
        lr.set_ylabel("learning rate")
        lr.set_ylim(0, 1.08 * max((max(stage.series.lr) for stage in run.begun), default=0) or None)
        lr.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        lr.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        lr.xaxis.set_major_locator(MaxNLocator(8 if layout is WIDE else 5))
        lr.set_xlabel("tokens along the lineage")
        return inline_svg(
            figure, f"training-{layout.name}", "Stages, training loss and learning rate over tokens"
        )


def _draw_tree(axes: Axes, run: RunRecord, layout: Layout) -> None:
    """One row a stage: a bar from its first to its last token, joined to the stage it continues."""
    colours = stage_colours(run)
    end = max((stage.end_tokens or stage.last_tokens for stage in run.stages), default=1)
    row_of = {stage.name: row for row, stage in enumerate(run.stages)}
    for row, stage in enumerate(run.stages):
        planned = (stage.end_tokens or stage.last_tokens) - stage.start_tokens
        done = stage.last_tokens - stage.start_tokens
        colour = colours[stage.name]
        axes.barh(row, planned, left=stage.start_tokens, height=0.55, color=colour, alpha=0.22, linewidth=0)
        axes.barh(row, done, left=stage.start_tokens, height=0.55, color=colour, linewidth=0)
        if stage.parent in row_of:
            line: dict[str, Any] = {
                "color": colour if stage.is_branch else "#b8c2cc",
                "linewidth": 1.2,
                "zorder": 1,
            }
            axes.plot([stage.start_tokens] * 2, [row_of[stage.parent], row], solid_capstyle="butt", **line)
        note = f"{short(planned)} tokens" if layout is NARROW else _stage_note(stage, planned)
        right = stage.start_tokens + planned
        after = right < 0.55 * end  # else there is more room before the bar
        axes.annotate(
            note,
            (right if after else stage.start_tokens, row),
            (5 if after else -5, 0),
            textcoords="offset points",
            ha="left" if after else "right",
            va="center",
            color=MUTED,
            size=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},  # over the lines that join stages
        )
    axes.set_yticks(range(len(run.stages)), [stage.name for stage in run.stages])
    for label, stage in zip(axes.get_yticklabels(), run.stages, strict=True):
        label.set_color(colours[stage.name])
        label.set_fontweight("bold")
    axes.set_ylim(len(run.stages) - 0.4, -0.6)
    axes.grid(False)
    axes.tick_params(length=0, labelbottom=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _stage_note(stage: StageRun, tokens: int) -> str:
    parts = [f"{short(tokens)} tokens"]
    if stage.seq_length:
        parts.append(f"length {stage.seq_length:,}")
    if "precision" in stage.settings:
        parts.append(stage.settings["precision"])
    if stage.is_branch:
        parts.append(f"from {stage.parent}")
    return " · ".join(parts)


def _loss_curve(stage: StageRun, run: RunRecord) -> tuple[Any, Any]:
    """Loss over tokens, with about as many points per token in every stage."""
    whole = max(other.last_tokens for other in run.begun)
    share = (stage.last_tokens - stage.start_tokens) / whole
    return binned(stage.series.tokens, stage.series.loss, max(FEWEST_POINTS, round(POINTS * share)))


def _draw_loss(
    axes: Axes,
    curve: tuple[Any, Any],
    half: int,
    start_tokens: int,
    before: tuple[Any, Any] | None,
    colour: str,
) -> tuple[Any, Any]:
    """Single steps faint, a running mean on top; returns the mean, from which later stages go on.

    `before` is the mean of the stage that this one continues: where it stood there, this one begins.
    """
    x, y = curve
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
    mean = running_mean(y, half)
    if before is not None:
        inherited = float(np.interp(start_tokens, *before))
        x = np.insert(x, 0, start_tokens)
        mean = np.insert(
            running_mean(np.concatenate([np.full(half, inherited), y]), half)[half:], 0, inherited
        )
    axes.plot(x, mean, color=colour, linewidth=1.9, solid_capstyle="round", solid_joinstyle="round")
    return x, mean


def _draw_lr(axes: Axes, stage: StageRun, colour: str) -> None:
    """The rate of each step over the tokens where the step starts."""
    series = stage.series
    starts = np.concatenate([[stage.start_tokens], series.tokens[:-1]])
    x, y = binned(starts, series.lr)
    # A finished stage's line ends with the rate that the plan gives there, where the next one begins.
    end = stage.settings.get("lr_end", y[-1]) if stage.complete else y[-1]
    axes.plot([*x, series.tokens[-1]], [*y, end], color=colour, linewidth=1.8, solid_capstyle="butt")


def binned(x: Any, y: Any, points: int = POINTS) -> tuple[Any, Any]:
    """Means of at most `points` runs of neighbours: a picture has no room for millions of steps."""
    x_all, y_all = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x_all) <= points:
        return x_all, y_all
    starts = np.linspace(0, len(x_all), points, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x_all)])
    # The last x of a run, not the middle: the curve then ends where the stage ends.
    return x_all[np.append(starts[1:], len(x_all)) - 1], np.add.reduceat(y_all, starts) / counts


def running_mean(values: Any, half: int) -> Any:
    """Mean of each value with `half` neighbours on both sides, as many as there are near the ends."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    index = np.arange(len(values))
    first, last = np.maximum(0, index - half), np.minimum(len(values), index + half + 1)
    return (sums[last] - sums[first]) / (last - first)


def _limit_loss(axes: Axes, run: RunRecord) -> None:
    """Let the steep first steps of a long run leave the picture, so that the rest of it has room."""
    if sum(len(stage.series) for stage in run.begun) < STEPS_OF_A_LONG_RUN:
        return
    losses = np.concatenate([_loss_curve(stage, run)[1] for stage in run.begun])
    losses = losses[np.isfinite(losses)]
    if len(losses):
        low, high = losses.min(), np.quantile(losses, 0.98)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _trunk_boundaries(run: RunRecord) -> list[int]:
    return [stage.start_tokens for stage in run.stages if not stage.is_branch and stage.start_tokens > 0]


def mixture(run: RunRecord, layout: Layout) -> str:
    """Per stage, the planned shares of the sources above the drawn ones."""
    colours, names = source_colours(run), run.source_names
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(layout.width, 0.62 * len(run.stages) + 0.75), layout="constrained")
        axes = figure.subplots()
        for row, stage in enumerate(run.stages):
            planned = {name: source["weight"] for name, source in stage.planned.items()}
            total = sum(stage.drawn.values())
            drawn = {name: windows / total for name, windows in stage.drawn.items()} if total else {}
            _stacked_bar(axes, row - 0.16, 0.22, planned, names, colours, label_above=None)
            _stacked_bar(
                axes, row + 0.14, 0.36, drawn, names, colours, label_above=0.07 if layout is WIDE else 0.13
            )
            axes.text(1.012, row - 0.16, "planned", va="center", size=7.5, color=MUTED)
            axes.text(1.012, row + 0.14, "drawn", va="center", size=7.5, color=INK if drawn else "#b8c2cc")
        axes.set_yticks(range(len(run.stages)), [stage.name for stage in run.stages])
        axes.set_ylim(len(run.stages) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
        axes.set_xlabel("share of windows")
        axes.grid(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        return inline_svg(figure, f"mixture-{layout.name}", "Planned and drawn mixture of each stage")


def _stacked_bar(
    axes: Axes,
    y: float,
    height: float,
    shares: dict[str, float],
    names: list[str],
    colours: dict[str, str],
    label_above: float | None,  # write the share on segments that are wide enough
) -> None:
    left = 0.0
    for name in names:
        share = shares.get(name, 0.0)
        axes.barh(
            y,
            share,
            left=left,
            height=height,
            color=colours[name],
            alpha=0.45 if label_above is None else 1,
            linewidth=0,
        )
        if label_above is not None and share >= label_above:
            text_colour = "white" if is_dark(colours[name]) else INK
            axes.text(
                left + share / 2, y, f"{share:.1%}", ha="center", va="center", size=8, color=text_colour
            )
        left += share


def throughput(run: RunRecord, layout: Layout) -> str:
    """Tokens per second over the time spent in steps, a colour for each stage."""
    colours = stage_colours(run)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(layout.width, 2.5), layout="constrained")
        axes = figure.subplots()
        total = sum(stage.seconds for stage in run.begun)
        unit, per_unit = next(
            (u, s) for u, s in (("hours", 3600), ("minutes", 60), ("s", 1)) if total > 2 * s or s == 1
        )
        elapsed, top = 0.0, 0.0
        for stage in run.begun:
            ends = (elapsed + np.cumsum(stage.series.seconds)) / per_unit
            x, y = binned(ends, stage.series.tokens_per_s)
            axes.plot(x, y, color=colours[stage.name], linewidth=0.8, alpha=0.35)
            middle = float(np.median(stage.series.tokens_per_s))
            axes.plot(
                [elapsed / per_unit, ends[-1]], [middle, middle], color=colours[stage.name], linewidth=2.2
            )
            elapsed += stage.seconds
            top = max(top, middle, float(np.quantile(stage.series.tokens_per_s, 0.98)))
        axes.set_ylim(0, top * 1.15 or 1)
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
        axes.set_ylabel("tokens per second")
        axes.set_xlabel(f"time in training steps ({unit})")
        return inline_svg(figure, f"throughput-{layout.name}", "Tokens per second over time")


def validation(run: RunRecord, layout: Layout) -> str:
    """For each source, its held-out loss before (ring) and after (dot) every stage."""
    colours = stage_colours(run)
    stages = [stage for stage in run.stages if stage.validation]
    names = [
        n for n in run.source_names if any(n in losses for s in stages for losses in s.validation.values())
    ]
    columns = min(layout.columns, len(names))
    rows = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        height = rows * (0.27 * len(stages) + 0.85)
        figure = Figure(figsize=(layout.width, height), layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            for row, stage in enumerate(stages):
                _draw_change(axes, row, stage, name, colours[stage.name])
            _limit_validation(axes, name, stages)
            axes.set_title(name, size=10, fontweight="bold", loc="left", color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
            axes.grid(False, axis="y")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        panels[0].set_yticks(range(len(stages)), [stage.name for stage in stages])
        panels[0].set_ylim(len(stages) - 0.5, -0.8)
        for axes in panels[::columns]:
            for label, stage in zip(axes.get_yticklabels(), stages, strict=True):
                label.set_color(colours[stage.name])
        figure.supxlabel("validation loss (nats per token)", size=9.5, color=MUTED)
        return inline_svg(
            figure, f"validation-{layout.name}", "Validation loss of each source before and after each stage"
        )


def _draw_change(axes: Axes, row: int, stage: StageRun, source: str, colour: str) -> None:
    before = stage.validation.get("start", {}).get(source)
    after = stage.validation.get("end", {}).get(source)
    if before is not None and after is not None:
        axes.plot([before, after], [row, row], color=colour, linewidth=1.8, alpha=0.5, zorder=2)
    if before is not None:
        axes.plot(before, row, "o", markersize=5.5, markerfacecolor="white", markeredgecolor=colour, zorder=3)
    if after is not None:
        axes.plot(after, row, "o", markersize=6, color=colour, zorder=4)


def _limit_validation(axes: Axes, source: str, stages: list[StageRun]) -> None:
    """Leave the untrained model's loss outside when it would squeeze everything else into a corner."""
    values = [losses[source] for s in stages for losses in s.validation.values() if source in losses]
    untrained = [
        s.validation["start"].get(source) for s in stages if s.parent is None and "start" in s.validation
    ]
    trained = [value for value in values if value not in untrained] or values
    low, high = min(trained), max(trained)
    margin = 0.14 * (high - low) or 0.1
    if max(values) <= high + 0.5 * (high - low):
        high = max(values)
    else:
        note: dict[str, Any] = {"ha": "right", "va": "bottom", "size": 7.5, "color": MUTED}
        axes.text(high + margin, -0.3, f"from {max(values):.2f} →", **note)
    axes.set_xlim(low - margin, high + margin)
