"""`smol inspect`: what a step read or will read, and when a text was or will be read.

The plan places a step in a stage, stream.py gives its rows, and the tokens are read and decoded as the
trainer reads them. Steps are numbered as in metrics.jsonl: step N is the one that completes N lineage
steps, so the first is 1. find.py goes the other way, from text to steps; this file asks and prints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape

from megatron_smol.data.ledger import PlannedStage
from megatron_smol.data.order import SourceOrder
from megatron_smol.data.stream import Rows, open_stream
from megatron_smol.errors import UserError, nearest
from megatron_smol.recipe.units import format_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_smol.data.documents import DocumentPart
    from megatron_smol.data.find import Found
    from megatron_smol.recipe.schema import Recipe

PREVIEW_CHARACTERS = 400
DOCUMENTS_SHOWN = 4
READS_SHOWN = 12


class _Stage(PlannedStage, Protocol):
    @property
    def end_step(self) -> int: ...
    @property
    def start_tokens(self) -> int: ...
    @property
    def end_tokens(self) -> int: ...


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


@dataclass(frozen=True)
class Content:
    """What one row holds: its text, and the documents that it comes from, in order."""

    text: str
    documents: list[DocumentPart]


def inspect_batch(
    recipe: Recipe,
    stage: str | None,
    step: int,
    index_only: bool = False,
    as_json: bool = False,
    tokens: int | None = None,
) -> None:
    """Print the rows of lineage step `step`, with documents and text unless `index_only`.

    With `tokens` it is the step in which the lineage reads its `tokens`-th token, whatever `step` says.
    """
    from megatron_smol.recipe.plan import make_plan, resolve_sizes

    plan = make_plan(recipe, resolve_sizes(recipe))
    if tokens is not None:
        stage, step = step_of_token(plan.stages, stage, tokens)
    batch = batch_of_step(plan.stages, plan.orders, stage, step)
    contents = None if index_only else read_rows(recipe, plan.stage(batch.stage), plan.orders, batch)
    if as_json:
        print(json.dumps(to_json(batch, contents), ensure_ascii=False, indent=1))
    else:
        _print(batch, contents)


def inspect_text(
    recipe: Recipe, text: str, sources: Sequence[str], stage: str | None, limit: int, as_json: bool = False
) -> None:
    """Print when the documents that hold `text` are read; stops after `limit` documents."""
    from megatron_smol.data.find import find_text
    from megatron_smol.recipe.plan import make_plan, resolve_sizes

    plan = make_plan(recipe, resolve_sizes(recipe))
    _require_stage([one.name for one in plan.stages], stage)
    found = find_text(
        plan, text, sources, [one.name for one in plan.stages if stage in (None, one.name)], limit
    )
    if as_json:
        print(json.dumps({"text": text, **asdict(found)}, ensure_ascii=False, indent=1))
    else:
        _print_found(text, found)


def step_of_token(stages: Sequence[_Stage], stage_name: str | None, tokens: int) -> tuple[str, int]:
    """(stage, step) in which a lineage reads its `tokens`-th token, from 1; without a name the first stage."""
    _require_stage([stage.name for stage in stages], stage_name)
    for stage in stages:
        if stage_name in (None, stage.name) and stage.start_tokens < tokens <= stage.end_tokens:
            per_step = (stage.end_tokens - stage.start_tokens) // (stage.end_step - stage.start_step)
            return stage.name, stage.start_step + -(-(tokens - stage.start_tokens) // per_step)
    ranges = ", ".join(
        f"{stage.name} {format_tokens(stage.start_tokens)}..{format_tokens(stage.end_tokens)}"
        for stage in stages
        if stage_name in (None, stage.name)
    )
    raise UserError(f"token {format_tokens(tokens)} is not in the plan; allowed: {ranges}")


def batch_of_step(
    stages: Sequence[_Stage], orders: Mapping[str, SourceOrder], stage_name: str | None, step: int
) -> Batch:
    """The rows of a step; without a stage name the first stage of the file that has the step."""
    _require_stage([stage.name for stage in stages], stage_name)
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
    rows = open_stream(chosen, orders).rows(sample, sample + chosen.global_batch)
    seconds = time.perf_counter() - begin
    others = tuple(stage.name for stage in holders if stage is not chosen)
    return Batch(chosen.name, others, step, sample, chosen.seq_length, rows, seconds)


def _require_stage(names: list[str], name: str | None) -> None:
    if name is not None and name not in names:
        raise UserError(f"no stage '{name}' in the recipe; {nearest(name, names)}")


def read_rows(
    recipe: Recipe, stage: _Stage, orders: Mapping[str, SourceOrder], batch: Batch
) -> list[Content]:
    """What each row holds; the text has its control tokens (such as ends of documents) in it."""
    from megatron_smol.data.documents import Documents
    from megatron_smol.data.megatron_order import DocumentOrder
    from megatron_smol.data.source import load_source
    from megatron_smol.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.tokenizer)
    stream = open_stream(stage, orders)
    sources = {name: load_source(recipe.sources[name].path) for name in set(stream.names)}
    for source in sources.values():
        source.check_tokenizer(tokenizer)
    documents = {name: Documents(source) for name, source in sources.items()}
    readers, contents = stream.readers(sources), []
    for index, window in zip(batch.rows.source.tolist(), batch.rows.window.tolist(), strict=True):
        reader, start, length = readers[index], window * batch.seq_length, batch.seq_length
        pieces = reader.pieces(start, length) if isinstance(reader, DocumentOrder) else [(start, length)]
        parts = [part for piece in pieces for part in documents[stream.names[index]].parts(*piece)]
        contents.append(Content(tokenizer.decode(reader.read(start, length)), parts))
    return contents


def to_json(batch: Batch, contents: Sequence[Content] | None = None) -> dict[str, Any]:
    """The batch as plain data: a `rows` list of {source, epoch, window, documents, text} in the order of the
    batch; the last two only with contents.
    """
    rows: list[dict[str, Any]] = [
        {"source": batch.rows.names[source], "epoch": epoch, "window": window}
        for source, epoch, window in zip(
            batch.rows.source.tolist(), batch.rows.epoch.tolist(), batch.rows.window.tolist(), strict=True
        )
    ]
    for row, content in zip(rows, contents or (), strict=False):
        row |= {"documents": [asdict(part) for part in content.documents], "text": content.text}
    return {
        "stage": batch.stage,
        "also_in": list(batch.also_in),
        "step": batch.step,
        "first_sample": batch.sample,
        "seq_length": batch.seq_length,
        "seconds_to_order": batch.seconds_to_order,
        "rows": rows,
    }


def _print(batch: Batch, contents: Sequence[Content] | None) -> None:
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
            f"[bold cyan]{number:5d}  {row['source']}[/]  epoch {row['epoch']}  window {row['window']}"
        )
        if contents is not None:
            console.print(f"[dim]{escape(_listed(contents[number].documents))}[/]")
            whole = contents[number].text
            text, more = whole[:PREVIEW_CHARACTERS], len(whole) - PREVIEW_CHARACTERS
            rest = f" [dim]... {more} characters more, all in --json[/]" if more > 0 else ""
            console.print(escape(text) + rest)


def _listed(parts: Sequence[DocumentPart]) -> str:
    """ "shard-00003: document 17 (tokens 310..869 of 870), 18, 19, 20 (tokens 0..51 of 9,120)"."""
    shown = list(parts)
    if len(parts) > DOCUMENTS_SHOWN:
        shown = [*parts[: DOCUMENTS_SHOWN - 1], parts[-1]]
    words, shard = [], None
    for index, part in enumerate(shown):
        if len(shown) < len(parts) and index == len(shown) - 1:
            words.append(f"... {len(parts) - len(shown)} more ...")
        where = "" if part.shard == shard else f"{part.shard}: document "
        last = part.position + part.tokens - 1
        of = "" if part.whole else f" (tokens {part.position:,}..{last:,} of {part.document_tokens:,})"
        words.append(f"{where}{part.document}{of}")
        shard = part.shard
    return ", ".join(words)


def _print_found(text: str, found: Found) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for one in found.documents:
        console.print(
            f"[bold cyan]{one.source}[/]  {one.document.shard}: document {one.document.document} "
            f"({one.document.document_tokens:,} tokens), the text at token {one.document.position:,}"
        )
        if not one.reads:
            console.print(f"  never read: {one.why_never}" if one.why_never else "  not read by these stages")
        shown = sorted(one.reads, key=lambda read: not read.holds_text)[:READS_SHOWN]
        for read in (read for read in one.reads if read in shown):
            lineages = f"  (lineages: {', '.join(read.lineages)})" if found.lineages > 1 else ""
            console.print(
                f"  stage {read.stage}  step {read.step:,}  row {read.row}  epoch {read.epoch}  "
                f"window {read.window}{'' if read.holds_text else '  (another part of it)'}{lineages}"
            )
        if len(one.reads) > READS_SHOWN:
            console.print(f"  [dim]... {len(one.reads) - READS_SHOWN} more, all in --json[/]")
    if not found.documents:
        console.print(f"no document of {', '.join(found.searched)} holds {escape(repr(text))}")
    if not found.complete:
        console.print("[dim]stopped at --max-documents; more documents may hold it[/]")
