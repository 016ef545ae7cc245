"""A result of `smol bench train` for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_smol.recipe.units import format_bytes


def print_result(result: dict[str, Any], console: Console | None = None) -> None:
    """Speed, MFU, memory, kernels, versions."""
    console = console or Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    for name, text in _rows(result):
        grid.add_row(name, text)
    console.print(grid)


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    layout, speed, step = result["layout"], result["tokens_per_second_per_gpu"], result["step_seconds"]
    degrees = ", ".join(f"{name} {layout[name]}" for name in ("tp", "pp", "cp", "dp"))
    memory = result["memory_bytes"]
    fits = ", ".join(f"{'fits' if good else 'does not fit'} {size}" for size, good in memory["fits"].items())
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return [
        ("model", f"{result['name']}, {result['parameters']:,} parameters, {result['precision']}"),
        (
            "batch",
            f"{result['micro_batch']} x {result['seq_length']} tokens, {result['micro_batches']} micro-batch(es) a step; {degrees}",
        ),
        ("ran on", f"{result['device']['name']}: {result['backend']}"),
        (
            "speed",
            f"[bold]{speed['median']:,.0f}[/] tokens/s a rank ({speed['min']:,.0f} to {speed['max']:,.0f}, "
            f"{speed['steps']} steps), {step['median']:.4g} s a step, optimizer included, reading data not",
        ),
        ("FLOP/s", _flops(result)),
        (
            "peak memory",
            f"{format_bytes(memory['peak'])} (estimated {format_bytes(memory['estimated']['total'])}); {fits}",
        ),
        ("time by kind", _groups(result["kernels"]["seconds_by_group"])),
        ("longest", "\n".join(_kernel(one) for one in result["kernels"]["longest"][:5])),
        ("FP8 kernels", f"{len(result['kernels']['fp8'])}, {result['kernels']['fp8_seconds']:.3g} s"),
        ("versions", versions),
    ]


def _flops(result: dict[str, Any]) -> str:
    rates = result["flops_per_second_per_gpu"]
    text = f"{rates['causal'] / 1e12:.4g} TFLOP/s (causal), {rates['full'] / 1e12:.4g} (attention in full)"
    for kind, shares in result["mfu"].items():
        text += f"; MFU of {kind} peak {shares['causal']:.1%} (causal), {shares['full']:.1%} (full)"
    return text


def _groups(seconds: dict[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items() if part / total >= 0.01)


def _kernel(one: dict[str, Any]) -> str:
    mark = " [FP8]" if one["fp8"] else ""
    return f"{one['seconds'] * 1e3:.3g} ms in {one['calls']} calls: {one['name'][:90]}{mark}".replace(
        "[", "\\["
    )
