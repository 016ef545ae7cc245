"""Near and exact duplicates: keys of every document, groups that share one, and the first of each group stays.

A document has one key a band; two documents are joined when they agree in any, and joined documents are one group
(transitively). MinHash keys agree with probability s^rows where s is the share of word n-grams that two documents
have in common, so a pair is found with probability 1 - (1 - s^rows)^bands: FineWeb used 14 bands of 8 (found half the
time at s = 0.72), FineMath one band of 10. Words are compared in lower case, without punctuation, numbers as one
word, as datatrove's MinHash does; unlike there a document shorter than an n-gram has a key too. Keys are computed
in C++ (csrc/minhash.cpp); nothing is tokenized by a language model of words.

Three pipeline steps: `WriteKeys` at the end of one phase, `Group` alone between phases, `DropGrouped` at the start of
the next. Files: keys/RANK.npy (uint64[documents, bands]; 0 in wordless ones), drop/RANK.npy (int64: row numbers).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.typeshelper import StatHints
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megatron_smol import _csrc
from megatron_smol.curate.kept import FewDropped
from megatron_smol.curate.parts import write_array
from megatron_smol.errors import DataError

_BATCH = 256  # documents a call of the C++ side
_SPACES = re.compile(rb"\s+")


def found_share(similarity: float, bands: int, rows: int) -> float:
    """Probability that a pair is found whose n-gram sets overlap to `similarity` (Jaccard)."""
    return float(1 - (1 - similarity**rows) ** bands)


def minhash_keys(texts: list[bytes], ngram: int, bands: int, rows: int, seed: int) -> NDArray[np.uint64]:
    """Keys uint64[texts, bands]; a text without a word has zeros. Two calls agree wherever they run."""
    keys, has_words = _csrc.minhash_keys(texts, ngram, bands, rows, seed)
    keys[keys == 0] = 1
    keys[~has_words] = 0
    return keys


def exact_keys(texts: list[bytes]) -> NDArray[np.uint64]:
    """One key each, equal for texts that are equal up to white space."""
    digests = [hashlib.sha256(_SPACES.sub(b" ", text).strip()).digest()[:8] for text in texts]
    keys = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 1).copy()
    keys[keys == 0] = 1
    keys[[not text.strip() for text in texts]] = 0
    return keys


class WriteKeys(PipelineStep):
    """Passes documents on and writes their keys. bands 0: exact."""

    type, name = "dedup", "keys"

    def __init__(self, folder: Path, ngram: int, bands: int, rows: int, seed: int) -> None:
        super().__init__()
        self.folder, self.ngram, self.bands, self.rows, self.seed = folder, ngram, bands, rows, seed

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        found: list[NDArray[np.uint64]] = [np.empty((0, max(1, self.bands)), np.uint64)]
        batch: list[bytes] = []
        for document in data:
            batch.append(document.text.encode(errors="replace"))
            if len(batch) == _BATCH:
                found.append(self._keys(batch))
                batch = []
            yield document
        if batch:
            found.append(self._keys(batch))
        write_array(self.folder / f"{rank:05d}.npy", np.concatenate(found))

    def _keys(self, texts: list[bytes]) -> NDArray[np.uint64]:
        if self.bands == 0:
            return exact_keys(texts)
        return minhash_keys(texts, self.ngram, self.bands, self.rows, self.seed)


class Group(PipelineStep):
    """One task: reads all keys, writes for each rank which of its documents go."""

    type, name = "dedup", "groups"

    def __init__(self, keys: Path, drop: Path, ranks: int) -> None:
        super().__init__()
        self.keys, self.drop, self.ranks = keys, drop, ranks

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        files = [np.load(self._of(number), mmap_mode="r") for number in range(self.ranks)]
        counts = [len(keys) for keys in files]
        first = first_of_group(files)
        dropped = np.flatnonzero(first != np.arange(len(first)))
        bounds = np.cumsum([0, *counts])
        for number in range(self.ranks):
            own = dropped[(dropped >= bounds[number]) & (dropped < bounds[number + 1])] - bounds[number]
            write_array(self.drop / f"{number:05d}.npy", own.astype(np.int64))
        sizes = np.bincount(first) if len(first) else np.zeros(1, np.int64)
        self.stat_update("documents", value=len(first))
        self.stat_update("groups", value=int((sizes > 1).sum()))
        self.stat_update("largest_group", value=int(sizes.max()))
        yield from ()

    def _of(self, number: int) -> Path:
        path = self.keys / f"{number:05d}.npy"
        if not path.is_file():
            raise DataError(f"{path} is missing: the phase before has not ended; run the same command again")
        return path


def first_of_group(files: list[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """For each document of all files, in their order, the first of its group (itself where it is alone)."""
    count = sum(map(len, files))
    if not count:
        return np.empty(0, np.int64)
    left, right = [], []
    for band in range(files[0].shape[1]):  # one band at a time: 16 bytes a document
        keys = np.concatenate([file[:, band] for file in files])
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero((keys[order][1:] == keys[order][:-1]) & (keys[order][1:] != 0))
        left.append(order[same])
        right.append(order[same + 1])
    pairs = np.concatenate(left), np.concatenate(right)
    graph = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    first = np.full(label.max() + 1, count, np.int64)
    np.minimum.at(first, label, np.arange(count))
    return first[label]


class DropGrouped(PipelineStep):
    """Leaves out what `Group` listed."""

    type, name = "dedup", "duplicates"

    def __init__(self, drop: Path, label: str, few: FewDropped) -> None:
        super().__init__()
        self.drop, self.label, self.few = drop, label, few

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        gone = set(np.load(self.drop / f"{rank:05d}.npy").tolist())
        with self.few as few:
            for number, document in enumerate(data):
                self.stat_update(StatHints.total)
                if number in gone:
                    self.stat_update(StatHints.dropped, f"dropped_{self.label}")
                    few.write(document, rank)
                else:
                    self.stat_update(StatHints.forwarded)
                    self.update_doc_stats(document)
                    yield document
