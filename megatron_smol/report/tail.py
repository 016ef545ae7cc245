"""The tail of a run in its report: curves of SFT and DPO, read from RUN/sft and RUN/dpo.

`smol sft ... --output RUN/sft` puts them there; a run that has neither has no such section.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.report.charts import Chart, Line
from megatron_smol.report.collect import read_rows
from megatron_smol.report.downsample import binned, extremes, running_mean
from megatron_smol.report.style import INK

TITLES = {"sft": "SFT", "dpo": "DPO"}
# (stage, field of a row, title with its unit)
_PANELS = (
    ("sft", "loss", "SFT loss (nats per token)"),
    ("dpo", "loss", "DPO loss (nats per pair)"),
    ("dpo", "margin", "DPO margin (beta × nats)"),
    ("dpo", "accuracy", "DPO accuracy (share of pairs)"),
)
POINTS = 500

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


def curves(tails: Sequence[tuple[str, str, list[TailRun]]]) -> list[Chart]:
    """A chart a quantity over optimizer steps: training as a line, held-out rows as dots.

    tails: (label, colour, its tail) of each run.
    """
    charts = []
    for kind, name, title in _PANELS:
        its = [(label, colour, one) for label, colour, tail in tails for one in tail if one.kind == kind]
        lines = [line for label, colour, one in its for line in _lines(label, colour, one, name)]
        if lines:
            chart = Chart(
                f"{title} over optimizer steps",
                lines,
                "optimizer steps",
                title,
                x_format="whole",
                y_format="percent" if name == "accuracy" else "number",
                y_range=(0.0, 1.0) if name == "accuracy" else None,
                height=240,
            )
            charts.append(chart)
    return charts


def _lines(label: str, colour: str, run: TailRun, name: str) -> list[Line]:
    steps = [row["step"] for row in run.steps]
    values = [row[name] for row in run.steps]
    x, y = binned(steps, values, POINTS)
    few = extremes(steps, values, steps[0], steps[-1], POINTS)
    training = f"{label}: training" if label else "training"
    held = f"{label}: held out" if label else "held out"
    lines = [
        Line("single steps", *few, colour, training, width=0.8, alpha=0.35, named=False),
        Line(training, x, running_mean(y, max(1, len(y) // 50)), colour),
    ]
    if run.heldout:
        at, kept = [row["step"] for row in run.heldout], [row[name] for row in run.heldout]
        lines.append(Line(held, at, kept, INK if not label else colour, dots=True, dash=(4, 3), width=1.0))
    return lines
