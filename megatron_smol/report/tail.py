"""The tail of a run in its report: curves of SFT and DPO, read from RUN/sft and RUN/dpo.

`smol sft ... --output RUN/sft` puts them there; a run that has neither has no such section.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from megatron_smol.report.collect import read_rows
from megatron_smol.report.style import INK, MUTED, STYLE, WIDE, Layout, inline_svg

TITLES = {"sft": "SFT", "dpo": "DPO"}
# (stage, field of a row, title with its unit)
_PANELS = (
    ("sft", "loss", "SFT loss (nats per token)"),
    ("dpo", "loss", "DPO loss (nats per pair)"),
    ("dpo", "margin", "DPO margin (beta × nats)"),
    ("dpo", "accuracy", "DPO accuracy (share of pairs)"),
)
_COLOUR = "#2b6cb0"

Row = dict[str, Any]


@dataclass(frozen=True)
class TailRun:
    """SFT or DPO as far as it came: a row a step, rows of the held-out evaluations, and the final record."""

    kind: str
    steps: list[Row]
    heldout: list[Row]
    record: Row | None  # None: it has not finished

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    @property
    def facts(self) -> dict[str, str]:
        """What the section's table says of it, with units."""
        change = f"{self.steps[0]['loss']:.4f} → {self.steps[-1]['loss']:.4f}"
        held = f"{self.heldout[0]['loss']:.4f} → {self.heldout[-1]['loss']:.4f}" if self.heldout else ""
        last = (self.heldout or self.steps)[-1]
        return {
            "steps": f"{self.steps[-1]['step']:,}" + ("" if self.record else " so far"),
            "data": Path(str(self.record["dataset"])).name if self.record else "",
            "loss": change,
            "held-out loss": held,
            "margin": f"{last['margin']:+.3f}" if "margin" in last else "",
            "accuracy": f"{last['accuracy']:.1%}" if "accuracy" in last else "",
        }


def collect_tail(run_dir: Path) -> list[TailRun]:
    """SFT and DPO of a run folder, those that have begun."""
    found = []
    for kind in TITLES:
        folder = run_dir / kind
        steps = list(read_rows(folder / "metrics.jsonl"))
        if not steps:
            continue
        record = folder / "tail.json"
        found.append(
            TailRun(
                kind,
                steps,
                list(read_rows(folder / "validation.jsonl")),
                json.loads(record.read_text()) if record.is_file() else None,
            )
        )
    return found


def curves(tail: list[TailRun], layout: Layout) -> str:
    """A panel a quantity over optimizer steps: training as a line, held-out rows as dots."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    by_kind = {run.kind: run for run in tail}
    panels = [panel for panel in _PANELS if panel[0] in by_kind]
    columns = 2 if layout is WIDE and len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(layout.width, 2.3 * rows), layout="constrained")
        for axes, (kind, name, title) in zip(
            figure.subplots(rows, columns, squeeze=False).ravel(), panels, strict=True
        ):
            run = by_kind[kind]
            _draw(axes, run, name)
            axes.set_title(title, size=10, fontweight="bold", loc="left", color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_xlabel("optimizer steps")
        return inline_svg(
            figure, f"tail-{layout.name}", "Losses, margin and accuracy of SFT and DPO over steps"
        )


def _draw(axes: Any, run: TailRun, name: str) -> None:
    from megatron_smol.report.figures import binned, running_mean

    x, y = binned([row["step"] for row in run.steps], [row[name] for row in run.steps])
    axes.plot(x, y, color=_COLOUR, linewidth=0.8, alpha=0.35)
    axes.plot(x, running_mean(y, max(1, len(y) // 50)), color=_COLOUR, linewidth=1.8, label="training")
    if run.heldout:
        steps = [row["step"] for row in run.heldout]
        axes.plot(
            steps,
            [row[name] for row in run.heldout],
            "o--",
            color=INK,
            markersize=4.5,
            linewidth=0.8,
            label="held out",
        )
    if name == "margin":
        axes.axhline(0, color=MUTED, linewidth=0.8)
    if name == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8)
