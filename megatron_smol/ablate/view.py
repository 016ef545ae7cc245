"""The tables of an ablation, on the terminal: before it starts (what each run reads), and its results."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_smol.ablate.config import CONTROL
from megatron_smol.ablate.recipes import Run
from megatron_smol.ablate.results import Results, lower_is_better
from megatron_smol.recipe.units import format_tokens

_CLEAR = 0.05


def print_plan(runs: list[Run], console: Console) -> None:
    """What each arm mixes, and how often each source will have been read when its runs end."""
    first = {run.arm: run for run in reversed(runs)}
    table = Table(title=f"{len(runs)} runs", title_justify="left")
    table.add_column("arm")
    table.add_column("tokens", justify="right")
    table.add_column("mixture: epochs of each source at the end")
    for arm in dict.fromkeys(run.arm for run in runs):
        run = first[arm]
        epochs = run.epochs()
        parts = [
            f"{name} {float(share):.3g} ({epochs[name]:.2f} epochs)"
            for name, share in run.stage.weights.items()
        ]
        table.add_row(arm, format_tokens(run.stage.end_tokens - run.stage.start_tokens), ", ".join(parts))
    console.print(table)


def print_results(results: Results, console: Console) -> None:
    """Arms, best first; each metric with its error; a difference to the control is marked when it is clear (p < 0.05)."""
    order = "lower" if lower_is_better(results.rank_by) else "higher"
    table = Table(title=f"by {results.rank_by}, {order} is better", title_justify="left")
    table.add_column("arm")
    metrics = [results.rank_by, *(metric for metric in results.metrics if metric != results.rank_by)]
    for metric in metrics:
        table.add_column(metric, justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("time, s", justify="right")
    for arm in results.arms:
        cells = [_text(results, arm, metric) for metric in metrics]
        table.add_row(arm, *cells, format_tokens(results.tokens[arm]), f"{results.seconds[arm]:,.0f}")
    console.print(table)
    if CONTROL in results.cells:
        console.print(
            "± standard error over seeds; in brackets the difference to the control, * where a paired t test gives p < 0.05",
            markup=False,
        )


def _text(results: Results, arm: str, metric: str) -> str:
    cell = results.cells[arm][metric]
    text = f"{cell.mean:.4f}" + (f" ± {cell.error:.4f}" if cell.error is not None else "")
    if cell.difference is not None:
        clear = "*" if cell.p is not None and cell.p < _CLEAR else ""
        text += f" ({cell.difference:+.4f}{clear})"
    return text
