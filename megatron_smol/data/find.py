"""`smol inspect --find TEXT`: when a run reads the documents that hold a text, in every lineage.

The shards are spelled out as bytes, a stretch at a time, and searched; so it does not matter where the
tokenizer cut. The order needs no search: stream.py turns the tokens found into samples, and the plan turns
samples into steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_smol import _csrc
from megatron_smol.data.documents import DocumentPart, Documents
from megatron_smol.data.indexed import TokenArray
from megatron_smol.data.ledger import PlannedStage
from megatron_smol.data.order import SourceOrder
from megatron_smol.data.source import TokenSource
from megatron_smol.data.stream import Stream, open_stream
from megatron_smol.data.tokenizer import Tokenizer, byte_symbols, load_tokenizer
from megatron_smol.errors import DataError, UserError, nearest

if TYPE_CHECKING:
    from megatron_smol.recipe.plan import Plan

STRETCH_TOKENS = 1 << 20
# Never part of UTF-8: stands for control tokens, so that nothing is found across the end of a document.
SEPARATOR = b"\xff"


class Stage(PlannedStage, Protocol):
    @property
    def end_step(self) -> int: ...


@dataclass(frozen=True)
class Hit:
    """A place where the text stands: tokens [start, stop) of a source hold it, all in one document."""

    source: str
    start: int
    stop: int
    document: DocumentPart


@dataclass(frozen=True)
class Read:
    """One reading of a window of a document. Steps count from 1, rows of the global batch from 0."""

    stage: str
    step: int
    row: int
    epoch: int
    window: int
    lineages: tuple[str, ...]  # last stages of the lineages that this step is part of
    holds_text: bool = False  # some of the text, not only other parts of the document

    @property
    def place(self) -> tuple[str, int, int]:
        return self.stage, self.step, self.row


class Speller:
    """Tokens of a byte-level vocabulary as the bytes they stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        spelled = _token_bytes(tokenizer)
        self._starts = np.array([*accumulate(map(len, spelled), initial=0)], np.int64)
        self._spelling = b"".join(spelled)

    def spell(self, ids: TokenArray) -> bytes:
        """The bytes of all tokens."""
        try:
            return _csrc.spell(ids, self._spelling, self._starts)
        except ValueError as error:
            raise DataError(f"the tokens were made by another tokenizer: {error}") from None

    def ends(self, ids: TokenArray) -> np.ndarray:
        """Where each token ends in those bytes."""
        return np.cumsum(self._starts[ids.astype(np.int64) + 1] - self._starts[ids])


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id; control tokens, and ids that no token has, are the separator."""
    document = json.loads(tokenizer.files["tokenizer.json"])
    if "ByteLevel" not in json.dumps(document.get("decoder")):
        raise UserError(
            f"--find spells tokens out as bytes, which needs a byte-level tokenizer; {tokenizer.name} is of another kind"
        )
    byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    spelled = [SEPARATOR] * tokenizer.vocab_size
    for token, number in document["model"]["vocab"].items():
        if all(symbol in byte_of for symbol in token):
            spelled[number] = bytes(byte_of[symbol] for symbol in token)
    for added in document.get("added_tokens", []):
        spelled[added["id"]] = SEPARATOR if added.get("special") else added["content"].encode()
    return spelled


class Finder:
    """Looks for one text in sources."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self.wanted = text.encode()
        if not self.wanted:
            raise UserError("--find was given an empty text; give the words to look for")
        self._speller = Speller(tokenizer)

    def hits(self, name: str, source: TokenSource, searched: Callable[[int], None]) -> Iterator[Hit]:
        """Every place of the text, in bounded memory; `searched` is told the number of tokens done so far."""
        documents = Documents(source)
        for start in range(0, source.tokens, STRETCH_TOKENS):
            stop = min(start + STRETCH_TOKENS, source.tokens)
            # A token is at least a byte: what begins before `stop` ends in so many tokens behind it.
            ids = source.read(start, min(stop + len(self.wanted), source.tokens) - start)
            for first, last in self._find(ids, stop - start):
                part = next(documents.parts(start + first, last - first))
                if part.tokens == last - first:  # not across documents that no token separates
                    yield Hit(name, start + first, start + last, part)
            searched(stop)

    def _find(self, ids: TokenArray, begins_before: int) -> Iterator[tuple[int, int]]:
        """(first token, one behind the last) of each place that begins in the first tokens."""
        text = self._speller.spell(ids)
        place = text.find(self.wanted)
        ends = self._speller.ends(ids) if place >= 0 else np.empty(0)
        while place >= 0:
            bounds = [place, place + len(self.wanted) - 1]
            first, last = np.searchsorted(ends, bounds, "right").tolist()
            if first >= begins_before:
                return
            yield first, last + 1
            place = text.find(self.wanted, place + 1)


class Timetable:
    """When tokens of a source are read, over the whole tree of stages."""

    def __init__(self, stages: Sequence[Stage], orders: Mapping[str, SourceOrder]) -> None:
        self._stages, self._orders = stages, orders

    def reads(self, source: str, start: int, stop: int, stages: Sequence[str]) -> list[Read]:
        """Every step of these stages that reads any of the tokens [start, stop) as inputs, in order."""
        found = []
        for stage in self._stages:
            if stage.name not in stages or stage.weights.get(source, 0) == 0:
                continue
            samples = (stage.end_step - stage.start_step) * stage.global_batch
            reads = self._streams[stage.name].reads_of(source, start, stop, samples)
            for sample, epoch, window in zip(
                reads.sample.tolist(), reads.epoch.tolist(), reads.window.tolist(), strict=True
            ):
                steps, row = divmod(sample, stage.global_batch)
                step = stage.start_step + steps + 1
                found.append(Read(stage.name, step, row, epoch, window, self.lineages(stage.name, step)))
        return found

    def lineages(self, stage: str, step: int) -> tuple[str, ...]:
        """The lineages, named by their last stages, that a step of a stage is part of."""
        return tuple(leaf for leaf, path in self._paths.items() if step <= path.get(stage, 0))

    @property
    def lineage_count(self) -> int:
        return len(self._paths)

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        return {stage.name: open_stream(stage, self._orders) for stage in self._stages}

    @cached_property
    def _paths(self) -> dict[str, dict[str, int]]:
        """For each lineage, the last step of each stage that belongs to it."""
        by_name = {stage.name: stage for stage in self._stages}
        continued = {(stage.parent, stage.start_step) for stage in self._stages}
        paths = {}
        for leaf in self._stages:
            if (leaf.name, leaf.end_step) in continued:
                continue
            path, stage = {leaf.name: leaf.end_step}, leaf
            while stage.parent is not None:
                path[stage.parent] = stage.start_step
                stage = by_name[stage.parent]
            paths[leaf.name] = path
        return paths


@dataclass(frozen=True)
class FoundDocument:
    """A document that holds the text, and every step that reads a window with some of the document in it."""

    source: str
    document: DocumentPart  # the first part that is the text
    reads: list[Read]
    why_never: str | None

    def marked(self, of_text: list[Read]) -> FoundDocument:
        """With these reads marked as those of the text."""
        places = {read.place for read in of_text}
        reads = [replace(read, holds_text=read.holds_text or read.place in places) for read in self.reads]
        return replace(self, reads=reads)


@dataclass(frozen=True)
class Found:
    """Documents in the order of their sources. complete: false when the search stopped at its limit."""

    documents: list[FoundDocument]
    searched: tuple[str, ...]  # sources
    lineages: int  # of the whole plan
    complete: bool


def find_text(plan: Plan, text: str, sources: Sequence[str], stages: Sequence[str], limit: int) -> Found:
    """Search these sources (none: all) for a text, and tell when these stages read it; shows a progress bar."""
    from megatron_smol.data.source import load_source

    recipe = plan.recipe
    for name in sources:
        if name not in recipe.sources:
            raise UserError(f"no source '{name}' in the recipe; {nearest(name, recipe.sources)}")
    tokenizer = load_tokenizer(recipe.tokenizer)
    finder, timetable = Finder(text, tokenizer), Timetable(plan.stages, plan.orders)
    names = tuple(sources) or tuple(recipe.sources)
    opened = {name: load_source(recipe.sources[name].path) for name in names}
    found: dict[tuple[str, str, int], FoundDocument] = {}
    with _bar() as bar:
        for name, source in opened.items():
            source.check_tokenizer(tokenizer)
            task = bar.add_task(f"searching {name}", total=source.tokens)
            for hit in finder.hits(name, source, partial(_advance, bar, task)):
                key = (name, hit.document.shard, hit.document.document)
                if key not in found and len(found) == limit:
                    return Found([*found.values()], names, timetable.lineage_count, complete=False)
                if key not in found:
                    whole = timetable.reads(
                        name,
                        hit.document.first_token,
                        hit.document.first_token + hit.document.document_tokens,
                        stages,
                    )
                    why = _why_never(plan.orders[name], hit, source)
                    found[key] = FoundDocument(name, hit.document, whole, why)
                found[key] = found[key].marked(timetable.reads(name, hit.start, hit.stop, stages))
    return Found([*found.values()], names, timetable.lineage_count, complete=True)


def _why_never(order: SourceOrder, hit: Hit, source: TokenSource) -> str | None:
    if hit.start >= order.tokens:
        return f"in the last {source.tokens - order.tokens:,} tokens of the source, which are held out"
    if hit.start >= order.tokens_per_epoch:
        return f"in the last {order.tokens - order.tokens_per_epoch:,} tokens, which fill no page"
    return None


def _advance(bar: Progress, task: TaskID, searched: int) -> None:
    bar.update(task, completed=searched)


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
