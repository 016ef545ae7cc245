"""The order of documents in a source: a global shuffle in bounded memory, used by data/encode.py.

Every document gets a 64-bit key from (seed, block, row), and the source lists its documents by key. Tokenizing
leaves sorted parts; a shard is a range of keys, merged from all parts in runs that fit in memory, each part
opened once a run. A document too long to hold is a part of its own and is copied through. The order is a uniform
shuffle of all documents of the job, and the same whatever the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_smol.data.indexed import IndexedReader, TokenArray
from megatron_smol.errors import DataError

RUN_TOKENS = 64 << 20  # merged at a time: 128 MB of uint16, twice while they are put in order
_PUT_TOKENS = 4 << 20  # put in order at a time
_VIEWED_TOKENS = 24  # documents shorter than this on average are gathered by index, not one by one
_KEYS = 1 << 64
_UNIT_BITS, _BLOCK_BITS, _ROW_BITS = 22, 18, 24

# Where a document comes from: its key, its row in its unit of input (from 0), the number of the input.
ORIGIN = np.dtype([("key", "<u8"), ("row", "<u8"), ("input", "<u4")])


@dataclass(frozen=True)
class Documents:
    """Tokenized documents back to back: all ids, the length of each sequence, the sequences of each document."""

    ids: TokenArray
    lengths: TokenArray
    sequences: TokenArray
    origins: TokenArray  # ORIGIN

    @property
    def tokens(self) -> TokenArray:
        """Tokens of each document."""
        return np.diff(_bounds(self.lengths)[_bounds(self.sequences)])

    def between(self, start: int, stop: int) -> Documents:
        """Documents [start, stop), as views."""
        first = _bounds(self.sequences)
        tokens = _bounds(self.lengths)
        low, high = int(first[start]), int(first[stop])
        return Documents(
            self.ids[int(tokens[low]) : int(tokens[high])],
            self.lengths[low:high],
            self.sequences[start:stop],
            self.origins[start:stop],
        )

    def by_key(self) -> Iterator[Documents]:
        """All documents in the order of their keys, a few million tokens at a time."""
        order = np.argsort(self.origins["key"])
        first = _bounds(self.sequences)
        starts = _bounds(self.lengths)[first]
        tokens = np.diff(starts)
        pile = np.cumsum(tokens[order]) // _PUT_TOKENS
        for some in np.split(order, np.flatnonzero(np.diff(pile)) + 1):
            yield Documents(
                _gather(self.ids, starts[some], tokens[some]),
                _gather(self.lengths, first[some], self.sequences[some]),
                self.sequences[some],
                self.origins[some],
            )


@dataclass(frozen=True)
class Part:
    """Documents that tokenizing left behind, sorted by key: <prefix>.bin, .idx and .origins.npy."""

    prefix: Path
    first_row: int = 0  # of its block in the unit: rows in the file count from the block's start
    long_key: int | None = None  # the key of its only document, which is not to be held in memory

    @property
    def origins_path(self) -> Path:
        return self.prefix.with_name(self.prefix.name + ".origins.npy")

    def origins(self, start: int = 0, stop: int | None = None) -> TokenArray:
        found = np.array(np.load(self.origins_path, mmap_mode="r")[start:stop])
        found["row"] += np.uint64(self.first_row)
        return found

    def documents(self, keys: KeyRange | None = None) -> Documents:
        """Its documents in a range of keys, copied."""
        reader = IndexedReader(self.prefix)
        start, stop = 0, reader.documents
        if keys is not None:
            own = np.load(self.origins_path, mmap_mode="r")["key"]
            start = int(np.searchsorted(own, np.uint64(keys.start)))
            if keys.stop < _KEYS:
                stop = int(np.searchsorted(own, np.uint64(keys.stop)))
        bounds = np.array(reader.document_bounds[start : stop + 1])
        first, last = int(bounds[0]), int(bounds[-1])
        lengths = np.array(reader.lengths[first:last])
        begin = (
            int(reader.offsets[first]) // reader.dtype.itemsize if first < reader.sequences else reader.tokens
        )
        ids = np.array(reader.ids[begin : begin + int(lengths.sum(dtype=np.int64))])
        return Documents(ids, lengths, np.diff(bounds), self.origins(start, stop))

    def without_ids(self) -> Documents:
        reader = IndexedReader(self.prefix)
        sequences = np.diff(np.array(reader.document_bounds))
        return Documents(np.empty(0, reader.dtype), np.array(reader.lengths), sequences, self.origins())


@dataclass(frozen=True)
class KeyRange:
    """Documents with start <= key < stop."""

    start: int
    stop: int

    def split(self, parts: int) -> list[KeyRange]:
        width = self.stop - self.start
        edges = [self.start + width * part // parts for part in range(parts + 1)]
        return [KeyRange(*pair) for pair in itertools.pairwise(edges)]

    def __contains__(self, key: int) -> bool:
        return self.start <= key < self.stop


ALL_KEYS = KeyRange(0, _KEYS)


def document_keys(seed: int | None, unit: int, block: int, rows: TokenArray) -> TokenArray:
    """Keys of documents by their rows in a block; zeros without a seed.

    Mixing is a bijection of (unit, block, row), so no two documents share one.
    """
    highest = int(rows.max(initial=0))
    for what, found, bits in (
        ("files", unit, _UNIT_BITS),
        ("blocks in a file", block, _BLOCK_BITS),
        ("rows in a block or row group", highest, _ROW_BITS),
    ):
        if found >> bits:
            raise DataError(f"more than {1 << bits:,} {what}: merge small files, or write smaller row groups")
    if seed is None:
        return np.zeros(rows.size, dtype=np.uint64)
    place = np.uint64((unit << _BLOCK_BITS | block) << _ROW_BITS)
    return _mixed((rows.astype(np.uint64) | place) ^ _mixed(np.array([seed], dtype=np.uint64)))


def _mixed(values: TokenArray) -> TokenArray:
    """The finalizer of splitmix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: TokenArray = values ^ (values >> np.uint64(31))
    return mixed


def merged(parts: Sequence[Part], keys: KeyRange, runs: int) -> Iterator[Documents | Part]:
    """The documents of a key range in order. A part stands for its long document."""
    longs = sorted(
        ((part.long_key, part) for part in parts if part.long_key is not None and part.long_key in keys),
        key=lambda pair: pair[0],
    )
    short = [part for part in parts if part.long_key is None]
    for run in keys.split(runs):
        here = [pair for pair in longs if pair[0] in run]
        found = concatenated([part.documents(run) for part in short]) if short else None
        for documents in found.by_key() if found and found.sequences.size else ():
            own = documents.origins["key"]
            done = 0
            while here and here[0][0] < int(own[-1]):
                key, part = here.pop(0)
                stop = int(np.searchsorted(own, np.uint64(key)))
                yield documents.between(done, stop)
                yield part
                done = stop
            yield documents.between(done, own.size) if done else documents
        yield from (part for _, part in here)


def in_input_order(parts: Sequence[Part]) -> Iterator[Documents | Part]:
    for part in parts:
        yield part.documents() if part.long_key is None else part


def concatenated(parts: Sequence[Documents]) -> Documents:
    return Documents(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.sequences for part in parts]),
        np.concatenate([part.origins for part in parts]),
    )


def _bounds(counts: TokenArray) -> TokenArray:
    """Where each item begins when they lie back to back, and the end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _gather(values: TokenArray, starts: TokenArray, counts: TokenArray) -> TokenArray:
    """values[starts[i] : starts[i] + counts[i]] for every i, back to back."""
    total = int(counts.sum())
    if total >= _VIEWED_TOKENS * counts.size > 0:
        pairs = zip(starts.tolist(), (starts + counts).tolist(), strict=True)
        return np.concatenate([values[start:stop] for start, stop in pairs])
    shift = starts - _bounds(counts)[:-1]
    gathered: TokenArray = values[np.arange(total, dtype=np.int64) + np.repeat(shift, counts)]
    return gathered
