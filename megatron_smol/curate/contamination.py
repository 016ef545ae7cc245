"""Benchmark items in the text: word n-grams first, then the longest common subsequence with the item (FineMath's way).

FineMath dropped a page when it had a 13-gram of GSM8K, MATH, MMLU or ARC in common with an item and the longest common
subsequence of words was at least 0.6 of the item (SmolLM2 paper 3.3.2). Numbers are kept as they are: with numbers folded
into one word, as datatrove's filter does by default, 46 % of GSM8K's own training set would count as its test set.
An item shorter than an n-gram is searched for whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from rapidfuzz.distance import LCSseq

from megatron_smol.curate.kept import CONTAMINATION, FewDropped
from megatron_smol.data.corpus import opened
from megatron_smol.errors import UserError

_WORD = re.compile(r"[^\W_]+")
_FEWEST_WORDS = 5  # of an item: shorter ones ("yes or no?") are in every text


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Item:
    """A benchmark item: `benchmark` (file name), `number` (its line), the words."""

    benchmark: str
    number: int
    words: tuple[str, ...]


@dataclass
class Index:
    """N-grams of all items; an item of fewer words than an n-gram is one of its own length."""

    ngram: int
    items: list[Item] = field(default_factory=list)

    @cached_property
    def by_ngram(self) -> dict[tuple[str, ...], list[int]]:
        found: dict[tuple[str, ...], list[int]] = {}
        for number, item in enumerate(self.items):
            length = min(self.ngram, len(item.words))
            for gram in {item.words[i : i + length] for i in range(len(item.words) - length + 1)}:
                found.setdefault(gram, []).append(number)
        return found

    @cached_property
    def lengths(self) -> list[int]:
        return sorted({len(gram) for gram in self.by_ngram})

    def hits(self, words: list[str]) -> Iterator[tuple[Item, tuple[str, ...]]]:
        """Items with an n-gram in the text, each once, with the first such n-gram."""
        seen: set[int] = set()
        for length in self.lengths:
            for start in range(len(words) - length + 1):
                gram = tuple(words[start : start + length])
                for number in self.by_ngram.get(gram, ()):
                    if number not in seen:
                        seen.add(number)
                        yield self.items[number], gram

    def find(self, text: str, ratio: float) -> dict[str, Any] | None:
        """The first item of which the text has an n-gram and, in the item's order, at least `ratio` of the words."""
        words = words_of(text)
        for item, gram in self.hits(words):
            common = LCSseq.similarity(item.words, words) / len(item.words)
            if common >= ratio:
                return {
                    "benchmark": item.benchmark, "item": item.number, "ngram": " ".join(gram), "ratio": round(common, 3),
                }  # fmt: skip
        return None


def load_index(files: tuple[str, ...], fields: tuple[str, ...], ngram: int) -> Index:
    """Items of local JSONL or parquet benchmark files; UserError when there are none to find."""
    index = Index(ngram)
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"no benchmark file at {file}; give JSONL or parquet files with the test items")
        for number, record in enumerate(_records(path), 1):
            missing = [name for name in fields if name not in record]
            if missing:
                raise UserError(
                    f"{file} line {number}: no field '{missing[0]}'; found: {', '.join(record)}; set `fields`"
                )
            words = tuple(words_of(" ".join(str(record[name]) for name in fields)))
            if len(words) >= _FEWEST_WORDS:
                index.items.append(Item(path.name, number, words))
    if not index.items:
        raise UserError(
            f"the benchmark files {', '.join(files) or '(none given)'} hold no item of {_FEWEST_WORDS} words or more: nothing could be "
            "found, and everything would pass"
        )
    return index


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield from pq.read_table(path).to_pylist()
        return
    with opened(path) as stream:
        for line in stream:
            if not line.isspace():
                yield json.loads(line)


class Decontaminate(BaseFilter):
    """Drops documents that hold an item; their metadata say which, by which n-gram, and how much of it."""

    type, name = "filter", "contamination"

    def __init__(
        self, files: tuple[str, ...], fields: tuple[str, ...], ngram: int, ratio: float, few: FewDropped
    ) -> None:
        super().__init__(exclusion_writer=few)
        self.files, self.fields, self.ngram, self.ratio = files, fields, ngram, ratio
        load_index(files, fields, ngram)  # what is wrong with them is told before any task starts
        self._index: Index | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._index is None:  # each worker its own: not pickled with the step
            self._index = load_index(self.files, self.fields, self.ngram)
        if (found := self._index.find(doc.text, self.ratio)) is None:
            return True
        doc.metadata[CONTAMINATION] = found
        return False, found["benchmark"]
