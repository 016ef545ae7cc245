"""What `smol plan --fit` prints: the best layouts with their reason, and why the obvious others are not among them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_smol.recipe.fit import Fit, Proposal, budget
from megatron_smol.recipe.units import format_bytes

SHOWN = 5


def print_fit(found: Fit, as_json: bool = False, console: Console | None = None) -> None:
    """To standard output, as tables or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(to_json(found), indent=2) + "\n")
        return
    console = console or Console(highlight=False)
    best = found.proposals[0]
    stages = ", ".join(one.stage.name for one in best.stages)
    console.print(
        f"\n[bold]{found.cluster}[/], {format_bytes(budget(found.cluster))} of each to use; micro-batches in windows, for "
        f"{escape(stages)}\n"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(("layout", "micro-batch", "memory", "tokens/s/GPU", "days", "limited by")):
        table.add_column(column, justify="left" if index in (0, 5) else "right", vertical="top")
    for one in found.proposals[:SHOWN]:
        table.add_row(
            str(one.layout),
            _micro_batches(one),
            format_bytes(one.fullest.memory.total),
            f"{one.tokens_per_second_per_gpu:,.0f}",
            f"{one.seconds / 86400:,.2f}",
            one.reason(),
        )
    console.print(table)
    console.print(f"\n[dim]{len(found.proposals)} layouts fit. Speed: {found.calibration.source}.[/]")
    console.print("\n[bold]The best, as settings[/]")
    console.print(escape(" ".join(best.overrides())), soft_wrap=True)
    console.print("\n[bold]Why not[/]")
    for rejection in found.rejections:
        console.print(f"  [bold]{escape(rejection.what)}[/]: {escape(rejection.why)}")


def to_json(found: Fit, shown: int = 20) -> dict[str, Any]:
    """cluster, usable bytes, the first `shown` proposals and the rejections; bytes and seconds are plain numbers."""
    return {
        "fit_version": 1,
        "cluster": {
            "gpus": found.cluster.gpus,
            "device": found.cluster.device.name,
            "memory": found.cluster.device.memory,
            "usable": budget(found.cluster),
        },
        "speed": found.calibration.source,
        "proposals": [_proposal_json(one) for one in found.proposals[:shown]],
        "rejections": [asdict(one) for one in found.rejections],
    }


def _proposal_json(one: Proposal) -> dict[str, Any]:
    return {
        "layout": asdict(one.layout),
        "tokens_per_second_per_gpu": one.tokens_per_second_per_gpu,
        "days": one.seconds / 86400,
        "gpu_hours": one.seconds / 3600 * one.layout.ranks,
        "bytes_left": one.bytes_left,
        "reason": one.reason(),
        "overrides": one.overrides(),
        "stages": {
            fit.stage.name: {
                "micro_batch": fit.work.micro_batch,
                "memory": {**asdict(fit.memory), "total": fit.memory.total},
                "step_seconds": {**fit.time.parts(), "total": fit.time.total},
                "bytes_sent_per_step": asdict(fit.time.traffic),
                "tokens_per_second_per_gpu": fit.time.tokens_per_second_per_gpu,
            }
            for fit in one.stages
        },
    }


def _micro_batches(one: Proposal) -> str:
    """One number, or one for each stage."""
    sizes = [fit.work.micro_batch for fit in one.stages]
    return str(sizes[0]) if len(set(sizes)) == 1 else " ".join(map(str, sizes))
