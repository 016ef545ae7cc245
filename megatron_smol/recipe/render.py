"""`smol plan`: a plan as tables for people (and, through `document`, as JSON for programs).

The last step of the torch-free half: reads a `Plan` and `estimate`'s figures and prints them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megatron_smol.recipe import estimate
from megatron_smol.recipe.document import lr_boundaries, to_json
from megatron_smol.recipe.memory import Layout
from megatron_smol.recipe.plan import ROUNDING_RULE, Plan, StagePlan
from megatron_smol.recipe.units import format_bytes, format_tokens

__all__ = ["print_plan", "to_json"]


def print_plan(
    plan: Plan,
    tokens_per_second_per_gpu: float | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print the plan to standard output, as tables or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(to_json(plan, tokens_per_second_per_gpu), indent=2) + "\n")
        return
    console = console or Console(highlight=False)
    _print_head(console, plan)
    _print_stages(console, plan)
    _print_lr(console, plan)
    _print_mixtures(console, plan)
    _print_reading(console, plan)
    _print_costs(console, plan, tokens_per_second_per_gpu)
    _print_problems(console, plan)


def _print_head(console: Console, plan: Plan) -> None:
    model, end = plan.recipe.model, plan.trunk[-1]
    attention = f"{model.heads} heads" + (
        "" if model.kv_heads == model.heads else f" ({model.kv_heads} key/value)"
    )
    console.print(
        f"\n[bold]{escape(plan.recipe.name)}[/]  [bold cyan]{model.parameters():,}[/] parameters", end=""
    )
    console.print(
        f" ({estimate.embedding_parameters(model):,} {'tied ' if model.tied_embeddings else ''}embedding)\n"
        f"{model.layers} layers of {model.hidden_size}, {attention}, feed-forward {model.ffn_size}\n"
        f"[bold cyan]{end.end_step:,}[/] steps, [bold cyan]{format_tokens(end.end_tokens)}[/] tokens "
        f"along the trunk; "
        f"{format_tokens(sum(stage.tokens for stage in plan.stages))} in all {len(plan.stages)} stages"
    )


def _print_table(
    console: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[str | Text]]
) -> None:
    """A titled table: first column to the left, others to the right; long names break at their hyphen."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        header = column.replace("-", "-\n", 1) if len(column) > 9 else column
        table.add_column(header, justify="right" if index else "left", no_wrap=index == 0, vertical="bottom")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/]")
    console.print(table)


def _print_stages(console: Console, plan: Plan) -> None:
    columns = ("stage", "steps", "to tokens", "length x batch", "rope", "precision", "LR")
    rows = (
        (
            _stage_label(stage),
            f"{stage.start_step:,} → {stage.end_step:,}",
            format_tokens(stage.end_tokens),
            f"{stage.seq_length} x {stage.global_batch}",
            f"{stage.rope_base:,.0f}",
            stage.precision,
            f"{_rate(plan.lr(stage.index, stage.start_step))} → "
            f"{_rate(plan.lr(stage.index, stage.end_step))}",
        )
        for stage in plan.stages
    )
    _print_table(console, "Stages", columns, rows)
    for stage in plan.stages:
        if stage.is_branch:
            console.print(
                f"[dim]{stage.name} leaves {stage.parent} at step {stage.start_step:,} "
                f"({format_tokens(stage.start_tokens)} tokens) for {stage.steps:,} steps, "
                f"{format_tokens(stage.tokens)} tokens.[/]"
            )
    console.print(f"[dim]Rounding: {ROUNDING_RULE}.[/]")


def _print_lr(console: Console, plan: Plan) -> None:
    rows = [("first step", "0", "0", _rate(plan.lr(0, 0)), plan.stages[0].name)]
    for row in lr_boundaries(plan):
        step = "beyond the end" if row["step"] is None else f"{row['step']:,}"
        rows.append((row["what"], step, format_tokens(row["tokens"]), _rate(row["lr"]), row["stage"] or "-"))
    _print_table(console, "Learning rate", ("where", "step", "tokens", "LR", "in"), rows)
    console.print(
        "[dim]A step uses the LR at the tokens consumed before it: warm-up starts with a step of LR 0.[/]"
    )


def _print_mixtures(console: Console, plan: Plan) -> None:
    rows = []
    for name in plan.recipe.sources:
        weights = (stage.weights.get(name) for stage in plan.stages)
        rows.append((name, *("" if weight is None else f"{float(100 * weight):.4g}" for weight in weights)))
    _print_table(
        console, "Mixtures, % of a stage's windows", ("source", *(s.name for s in plan.stages)), rows
    )


def _print_reading(console: Console, plan: Plan) -> None:
    """Tokens and epochs of every source, per stage and along the longest lineage."""
    rows: list[tuple[str | Text, ...]] = []
    total = plan.epochs()
    between = " " if len(plan.stages) <= 5 else "\n"  # what fits side by side in 100 columns
    for name, source in plan.recipe.sources.items():
        drawn = (stage.tokens_drawn(name) for stage in plan.stages)
        per_epoch, cap = plan.orders[name].tokens_per_epoch, source.max_epochs
        cells = (
            f"{_short(tokens)}{between}[dim]{_epochs(tokens / per_epoch)}[/]" if tokens else ""
            for tokens in drawn
        )
        verdict = f"{_epochs(total[name])} / {'-' if cap is None else f'{cap:g}'}"
        style = "bold yellow" if cap is not None and total[name] > cap else ""
        rows.append((name, _short(plan.sizes[name]), *cells, Text(verdict, style)))
    columns = ("source", "size", *(stage.name for stage in plan.stages), "epochs / cap")
    _print_table(console, "Tokens read [dim](epochs of the source)[/]", columns, rows)
    console.print("[dim]Last column: the most epochs along any lineage, against max_epochs.[/]")
    skipped = sum(sum(stage.skipped_tokens.values()) for stage in plan.stages)
    if skipped:
        console.print(
            f"[dim]{format_tokens(skipped)} tokens are left unread where a stage changes seq_length.[/]"
        )


def _print_costs(console: Console, plan: Plan, tokens_per_second_per_gpu: float | None) -> None:
    """Memory, disk and time; time only where there are GPUs or a speed to count with."""
    parallel, disk = plan.recipe.parallel, estimate.disk(plan)
    grid = Table.grid(padding=(0, 2))
    _add_memory(grid, plan)
    dp = f"dp {estimate.data_parallel(parallel)}" if parallel.gpus else "dp as launched"
    layout = Layout.of(parallel)
    grid.add_row("layout", f"{str(layout).replace(f'dp {layout.dp}', dp)}{_sharding(layout)}")
    grid.add_row(
        "checkpoints",
        f"[cyan]{disk.written:,}[/] of {format_bytes(disk.bytes_each)} written, every "
        f"{plan.recipe.save.every:,} steps; "
        f"{disk.kept} kept for good; at most {format_bytes(disk.bytes_at_once)} on disk",
    )
    if parallel.gpus is not None or tokens_per_second_per_gpu is not None:
        _add_time(grid, plan, tokens_per_second_per_gpu)
    console.print("\n[bold]Costs[/]")
    console.print(grid)


def _sharding(layout: Layout) -> str:
    return ", optimizer state sharded over dp" if layout.distributed_optimizer else ", optimizer state whole"


def _add_memory(grid: Table, plan: Plan) -> None:
    """Of the stage that needs most, on its fullest rank."""
    model, parallel = plan.recipe.model, plan.recipe.parallel
    memories = [(estimate.memory_per_gpu(model, parallel, stage), stage) for stage in plan.stages]
    memory, stage = max(memories, key=lambda pair: pair[0].total)
    where = "Transformer Engine" if estimate.kernels(parallel) == "te" else "on the CPU"
    grid.add_row(
        "memory per rank",
        f"[cyan]{format_bytes(memory.total)}[/] in {stage.name} ({where}): {format_bytes(memory.weights)} "
        f"weights, {format_bytes(memory.gradients)} gradients, {format_bytes(memory.optimizer)} optimizer, "
        f"{format_bytes(memory.activations)} activations, {format_bytes(memory.logits)} logits, "
        f"{format_bytes(memory.workspace)} workspace",
    )


def _add_time(grid: Table, plan: Plan, tokens_per_second_per_gpu: float | None) -> None:
    """GPU-hours and days, FLOPs in both conventions, and what a rank sends."""
    model, parallel = plan.recipe.model, plan.recipe.parallel
    cost = estimate.compute(plan, tokens_per_second_per_gpu)
    days = (
        f", [cyan]{cost.gpu_hours / parallel.gpus / 24:.1f}[/] days on {parallel.gpus} GPUs"
        if parallel.gpus
        else ""
    )
    basis = f"modelled for {cost.device}; --fit compares layouts" if cost.assumed else "given"
    grid.add_row(
        "time",
        f"[cyan]{cost.gpu_hours:,.0f}[/] GPU-hours{days}, at {cost.tokens_per_second_per_gpu:,.0f} tokens/s per GPU "
        f"({basis})",
    )
    grid.add_row(
        "compute",
        f"{cost.flops:.3g} FLOPs = 6 x (weights + layers x hidden x length) x tokens, attention's causal half; "
        f"{cost.flops_full:.3g} with all of it (PaLM)",
    )
    stage = plan.stages[0]
    sent = _traffic_parts(estimate.stage_traffic(model, parallel, stage))
    parts = [f"{format_bytes(count)} {what}" for what, count in sent if count]
    grid.add_row("sent per step", f"by a rank in {stage.name}: {', '.join(parts) or 'nothing'}")


def _traffic_parts(sent: estimate.Traffic) -> list[tuple[str, float]]:
    return [
        ("gradients", sent.gradients),
        ("updated weights", sent.parameters),
        ("tensor parallel", sent.tensor),
        ("pipeline", sent.pipeline),
        ("context parallel", sent.context),
    ]


def _print_problems(console: Console, plan: Plan) -> None:
    console.print()
    for problem in plan.problems:
        style = "bold red" if problem.level == "error" else "bold yellow"
        console.print(f"[{style}]{problem.level}:[/] {escape(problem.message)}")
    if not plan.problems:
        console.print("[green]No problems found.[/]")


def _stage_label(stage: StagePlan) -> str:
    return f"└ {stage.name}" if stage.is_branch else stage.name


def _rate(lr: float) -> str:
    """Three significant digits, short: 5e-4."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if lr else "0"


def _short(tokens: int) -> str:
    """Three significant digits: 3.24T."""
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= scale * 0.9995:
            return f"{float(f'{tokens / scale:.3g}'):g}{suffix}"
    return str(tokens)


def _epochs(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.01 else f"{epochs:.1g}"
