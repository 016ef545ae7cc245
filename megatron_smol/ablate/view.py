"""The tables of an ablation, on the terminal: before it starts (what each run reads), and its results."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_smol.ablate.contrast import CLEAR_P, Contrast
from megatron_smol.ablate.recipes import Run
from megatron_smol.ablate.results import Results, lower_is_better
from megatron_smol.recipe.units import format_tokens


def print_plan(runs: list[Run], console: Console) -> None:
    """What each arm mixes, and how often each source will have been read when its runs end."""
    first = {run.arm.name: run for run in reversed(runs)}
    table = Table(title=f"{len(runs)} runs", title_justify="left")
    table.add_column("arm")
    table.add_column("tokens", justify="right")
    table.add_column("mixture: epochs of each source at the end")
    for arm in dict.fromkeys(run.arm.name for run in runs):
        run = first[arm]
        epochs = run.epochs()
        parts = [
            f"{name} {float(share):.3g} ({epochs[name]:.2f} epochs)"
            for name, share in run.stage.weights.items()
        ]
        table.add_row(arm, format_tokens(run.stage.tokens), ", ".join(parts))
    console.print(table)


def print_results(results: Results, console: Console) -> None:
    """The ranking, best first, with its errors and costs; then every other metric."""
    order = "lower" if lower_is_better(results.rank_by) else "higher"
    table = Table(title=f"by {results.rank_by}, {order} is better", title_justify="left")
    for column in (
        "arm",
        results.rank_by,
        "to the control",
        "p",
        "to the next arm",
        "p",
        "tokens",
        "time, s",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in results.arms:
        cell = results.cells[arm][results.rank_by]
        against = (
            None if cell.difference is None else Contrast(cell.difference, cell.difference_error, cell.p)
        )
        table.add_row(
            arm,
            _figure(cell.mean, cell.error),
            *_texts(against),
            *_texts(results.to_next[arm]),
            format_tokens(results.tokens[arm]),
            f"{results.seconds[arm]:,.0f}",
        )
    console.print(table)
    console.print(_LEGEND, markup=False)
    others = [metric for metric in results.metrics if metric != results.rank_by]
    if others:
        _print_others(results, others, console)


_LEGEND = (
    "mean ± standard error over the arm's own seeds; to the control: the difference with the same seeds, its error from what "
    "arm and seed do not explain in all arms together, p after Holm over the candidates; to the next arm: the next minus this; "
    "tokens and training time of all seeds"
)


def _print_others(results: Results, metrics: list[str], console: Console) -> None:
    table = Table(title="everything else that was measured", title_justify="left")
    table.add_column("arm")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for arm in results.arms:
        cells = [results.cells[arm][metric] for metric in metrics]
        marks = ["*" if cell.p is not None and cell.p < CLEAR_P else "" for cell in cells]
        figures = [_figure(cell.mean, cell.error) + mark for cell, mark in zip(cells, marks, strict=True)]
        table.add_row(arm, *figures)
    console.print(table)
    console.print(f"* differs from the control, p < {CLEAR_P:g}", markup=False)


def _figure(mean: float, error: float | None) -> str:
    return f"{mean:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _texts(found: Contrast | None) -> tuple[str, str]:
    """Difference with its error, and p."""
    if found is None:
        return "", ""
    difference = f"{found.difference:+.4f}" + (f" ± {found.error:.4f}" if found.error is not None else "")
    return difference, "" if found.p is None else "<0.0001" if found.p < 1e-4 else f"{found.p:.4f}"
