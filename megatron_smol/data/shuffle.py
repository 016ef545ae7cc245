"""The order of documents in a source: a global shuffle in bounded memory, used by data/tokenize.py.

Every document gets a 64-bit key from (seed, block, row), and the source lists its documents by key. A block's
documents are sorted when it is written; a shard is a range of keys, assembled from all blocks in runs that
fit in memory. The order is a uniform shuffle of all documents of the job, and the same whatever the number
of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_smol.data.indexed import IndexedReader, TokenArray

RUN_TOKENS = 8 << 20  # sorted at a time: about 100 MB of memory
_KEYS = 1 << 64


@dataclass(frozen=True)
class Documents:
    """Tokenized documents back to back: all ids, the length of each sequence, the sequences of each document."""

    ids: TokenArray
    lengths: TokenArray
    sequences: TokenArray

    def reordered(self, order: TokenArray) -> Documents:
        first = _bounds(self.sequences)
        token_bounds = _bounds(self.lengths)[first]
        return Documents(
            _gather(self.ids, token_bounds[order], np.diff(token_bounds)[order]),
            _gather(self.lengths, first[order], self.sequences[order]),
            self.sequences[order],
        )


@dataclass(frozen=True)
class KeyRange:
    """Documents with start <= key < stop."""

    start: int
    stop: int

    def split(self, parts: int) -> list[KeyRange]:
        width = self.stop - self.start
        edges = [self.start + width * part // parts for part in range(parts + 1)]
        return [KeyRange(*pair) for pair in itertools.pairwise(edges)]


ALL_KEYS = KeyRange(0, _KEYS)


def document_keys(seed: int, block: int, count: int) -> TokenArray:
    """Keys of the documents of a block. Mixing is a bijection of (block, row), so no two documents share one."""
    rows = np.arange(count, dtype=np.uint64) | np.uint64(block << 32)
    return _mixed(rows ^ _mixed(np.array([seed], dtype=np.uint64)))


def _mixed(values: TokenArray) -> TokenArray:
    """The finalizer of splitmix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: TokenArray = values ^ (values >> np.uint64(31))
    return mixed


def merged_runs(
    blocks: Sequence[IndexedReader], keys: Sequence[TokenArray], part: KeyRange, runs: int
) -> Iterator[Documents]:
    """The documents of a key range in order, a run at a time. Each block's documents are sorted by its keys."""
    for run in part.split(runs):
        slices = [np.searchsorted(own, np.uint64(run.start)) for own in keys]
        stops = [own.size if run.stop == _KEYS else np.searchsorted(own, np.uint64(run.stop)) for own in keys]
        found = [
            (documents_of(block, int(start), int(stop)), own[start:stop])
            for block, own, start, stop in zip(blocks, keys, slices, stops, strict=True)
            if stop > start
        ]
        if found:
            joined = concatenated([documents for documents, _ in found])
            yield joined.reordered(np.argsort(np.concatenate([own for _, own in found])))


def documents_of(block: IndexedReader, start: int, stop: int) -> Documents:
    """Documents [start, stop) of a shard, as views of its files."""
    bounds = block.document_bounds[start : stop + 1]
    first, last = int(bounds[0]), int(bounds[-1])
    lengths = block.lengths[first:last]
    begin = int(block.offsets[first]) // block.dtype.itemsize if first < block.sequences else block.tokens
    end = begin + int(lengths.sum(dtype=np.int64))
    return Documents(block.ids[begin:end], lengths, np.diff(bounds))


def concatenated(parts: Sequence[Documents]) -> Documents:
    return Documents(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.sequences for part in parts]),
    )


def _bounds(counts: TokenArray) -> TokenArray:
    """Where each item begins when they lie back to back, and the end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _gather(values: TokenArray, starts: TokenArray, counts: TokenArray) -> TokenArray:
    """values[starts[i] : starts[i] + counts[i]] for every i, back to back."""
    shift = starts - _bounds(counts)[:-1]
    gathered: TokenArray = values[np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(shift, counts)]
    return gathered
