"""Each layout against one process: what tests assert, and (`make parity`) the table of docs/parity.md."""

from __future__ import annotations

import datetime
import platform
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import LAYOUTS, Layout

STEPS = 20
LIMIT = 1e-5  # relative
Curve = list[tuple[float, float]]

HEAD = """# Layouts against one process

Written by `make parity`, {date}: megatron-core {core}, torch {torch}, gloo on {machine}. Each row trains {steps} fp32 steps
of a small model (8 layers, 4 heads, 2 key/value heads, tied embeddings unless it says "untied") with a change of RoPE
base half-way, then validates, and compares the loss and gradient norm of every step with one process: the largest
relative difference.
The tests require 1e-5, and initial weights that are equal bit for bit. DP is data parallel with the optimizer
sharded, unless it says "replicated optimizer".

| layout | ranks | loss | gradient norm | initial weights |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Result:
    """Differences are relative, the largest over all steps."""

    curve: Curve
    loss_difference: float
    norm_difference: float
    same_weights: bool
    same_on_all_ranks: bool


@cache
def one_process(layout: Layout) -> tuple[dict[str, str], Curve]:
    """Initial weights and curve of one rank."""
    return run_ranks(ranks.curve, 1, layout, STEPS)[0]  # type: ignore[no-any-return]


def run(layout: Layout, precision: str = "fp32") -> Result:
    """Train with `layout` and compare with one process that computes the same."""
    weights, expected = one_process(layout.reference)
    found = run_ranks(ranks.curve, layout.ranks, layout, STEPS, precision)
    curves = [curve for _, curve in found]
    pairs = list(zip(curves[0], expected, strict=True))
    return Result(
        curves[0],
        *(max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in (0, 1)),
        same_weights={item for part, _ in found for item in part.items()} == set(weights.items()),
        same_on_all_ranks=all(curve == curves[0] for curve in curves),
    )


def main() -> None:
    machine = f"{platform.system()} {platform.machine()}"
    table = HEAD.format(
        date=datetime.date.today(),
        core=version("megatron-core"),
        torch=version("torch"),
        machine=machine,
        steps=STEPS,
    )
    broken = []
    for layout in LAYOUTS:
        result = run(layout)
        if not result.same_weights or max(result.loss_difference, result.norm_difference) >= LIMIT:
            broken.append(layout.name)
        weights = "equal" if result.same_weights else "DIFFERENT"
        row = f"| {layout.name} | {layout.ranks} | {result.loss_difference:.1e} | {result.norm_difference:.1e} | {weights} |"
        print(row, file=sys.stderr)
        table += row + "\n"
    (Path(__file__).parents[1] / "docs" / "parity.md").write_text(table)
    if broken:
        sys.exit(f"error: not like one process: {', '.join(broken)}")


if __name__ == "__main__":
    main()
