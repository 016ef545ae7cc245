"""`smol inspect`: which rows make up the batch of a step, past or future, and what they say.

The plan places the step in a stage, stream.py gives its rows, and the tokens are read and decoded as the
trainer reads them. Steps are numbered as in metrics.jsonl: step N is the one that completes N lineage
steps, so the first is 1.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape

from megatron_smol.data.ledger import PlannedStage
from megatron_smol.data.order import SourceOrder
from megatron_smol.data.stream import Rows, StageStream
from megatron_smol.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_smol.recipe.schema import Recipe

PREVIEW_CHARACTERS = 400


class _Stage(PlannedStage, Protocol):
    @property
    def end_step(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """The global batch of one step. `sample` is its first row's number in the stage."""

    stage: str
    also_in: tuple[str, ...]  # other stages that have a step of this number: branches overlap their trunk
    step: int
    sample: int
    seq_length: int
    rows: Rows
    seconds_to_order: float


def inspect_batch(
    recipe: Recipe, stage: str | None, step: int, index_only: bool = False, as_json: bool = False
) -> None:
    """Print the rows of lineage step `step`, with their decoded text unless `index_only`."""
    from megatron_smol.recipe.plan import make_plan, resolve_sizes

    plan = make_plan(recipe, resolve_sizes(recipe))
    batch = batch_of_step(plan.stages, plan.orders, stage, step)
    texts = None if index_only else decode_rows(recipe, batch)
    if as_json:
        print(json.dumps(to_json(batch, texts), ensure_ascii=False, indent=1))
    else:
        _print(batch, texts)


def batch_of_step(
    stages: Sequence[_Stage], orders: Mapping[str, SourceOrder], stage_name: str | None, step: int
) -> Batch:
    """The rows of a step; without a stage name the first stage of the file that has the step."""
    names = [stage.name for stage in stages]
    if stage_name is not None and stage_name not in names:
        raise UserError(f"no stage '{stage_name}' in the recipe; {nearest(stage_name, names)}")
    holders = [stage for stage in stages if stage.start_step < step <= stage.end_step]
    chosen = next((stage for stage in holders if stage_name in (None, stage.name)), None)
    if chosen is None:
        ranges = ", ".join(
            f"{stage.name} {stage.start_step + 1}..{stage.end_step}"
            for stage in stages
            if stage_name in (None, stage.name)
        )
        raise UserError(f"step {step} is not in the plan; allowed: {ranges}")
    begin = time.perf_counter()
    sample = (step - 1 - chosen.start_step) * chosen.global_batch
    rows = StageStream(chosen, orders).rows(sample, sample + chosen.global_batch)
    seconds = time.perf_counter() - begin
    others = tuple(stage.name for stage in holders if stage is not chosen)
    return Batch(chosen.name, others, step, sample, chosen.seq_length, rows, seconds)


def decode_rows(recipe: Recipe, batch: Batch) -> list[str]:
    """The text of each row, control tokens (such as ends of documents) included."""
    from megatron_smol.data.source import load_source
    from megatron_smol.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.tokenizer)
    sources = {name: load_source(recipe.sources[name].path) for name in batch.rows.counts()}
    for source in sources.values():
        source.check_tokenizer(tokenizer)
    names = [batch.rows.names[index] for index in batch.rows.source]
    return [
        tokenizer.decode(sources[name].read(int(window) * batch.seq_length, batch.seq_length))
        for name, window in zip(names, batch.rows.window, strict=True)
    ]


def to_json(batch: Batch, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """The batch as plain data: a `rows` list of {source, epoch, window} in the order of the batch."""
    rows: list[dict[str, Any]] = [
        {"source": batch.rows.names[source], "epoch": epoch, "window": window}
        for source, epoch, window in zip(
            batch.rows.source.tolist(), batch.rows.epoch.tolist(), batch.rows.window.tolist(), strict=True
        )
    ]
    for row, text in zip(rows, texts or (), strict=False):
        row["text"] = text
    return {
        "stage": batch.stage,
        "also_in": list(batch.also_in),
        "step": batch.step,
        "first_sample": batch.sample,
        "seq_length": batch.seq_length,
        "seconds_to_order": batch.seconds_to_order,
        "rows": rows,
    }


def _print(batch: Batch, texts: Sequence[str] | None) -> None:
    console = Console(soft_wrap=True, highlight=False)
    drawn = ", ".join(f"{name} {count}" for name, count in batch.rows.counts().items())
    console.print(
        f"[bold]stage {batch.stage}, step {batch.step}[/]: {len(batch.rows)} windows of "
        f"{batch.seq_length} tokens ({drawn}); order found in {batch.seconds_to_order * 1e3:.2f} ms"
    )
    if batch.also_in:
        console.print(f"step {batch.step} is also in {', '.join(batch.also_in)}: choose with --stage")
    for number, row in enumerate(to_json(batch)["rows"]):
        console.print(
            f"[bold cyan]{number:5d}  {row['source']}[/]  epoch {row['epoch']}  window {row['window']}  "
            f"tokens from {row['window'] * batch.seq_length}"
        )
        if texts is not None:
            text, more = texts[number][:PREVIEW_CHARACTERS], len(texts[number]) - PREVIEW_CHARACTERS
            rest = f" [dim]... {more} characters more, all in --json[/]" if more > 0 else ""
            console.print(escape(text) + rest)
