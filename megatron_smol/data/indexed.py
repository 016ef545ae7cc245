"""Megatron's token files: one shard is `<prefix>.bin` (token ids) and `<prefix>.idx` (where documents lie).

Written by data/tokenize.py, read by data/source.py and by megatron-core's IndexedDataset; byte-identical to
what megatron-core 0.16.1's IndexedDatasetBuilder writes. The .idx holds, little-endian: 9 bytes magic, u64
version, u8 dtype code, u64 sequences, u64 document bounds, then i32 sequence lengths, i64 byte offsets of the
sequences, and i64 document bounds (index of each document's first sequence, and the end). A document is
one sequence, or several when it was split into sentences.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron_smol.data.files import (
    explained_disk_errors,
    flush_to_disk,
    partial_path,
    publish,
)
from megatron_smol.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
_DTYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {np.dtype(kind): code for code, kind in _DTYPES.items()}
_MAX_SEQUENCE = np.iinfo(np.int32).max  # the format keeps lengths in 32 bits

TokenArray = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type megatron-core chooses for a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class IndexHeader:
    """What the first 34 bytes of an .idx say."""

    dtype: np.dtype[Any]
    sequences: int
    bounds: int  # documents + 1

    @property
    def idx_bytes(self) -> int:
        return _HEADER.size + self.sequences * 12 + self.bounds * 8


def read_header(path: Path) -> IndexHeader:
    """Header of an .idx file, after checking that the file is as long as the header says."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEADER.size)
            found = os.fstat(stream.fileno()).st_size
    except FileNotFoundError:
        raise DataError(f"missing shard file {path}: restore it, or run the preprocessing again") from None
    if len(head) < _HEADER.size or head[:9] != _MAGIC:
        raise DataError(
            f"{path} is not a Megatron index: it begins with {head[:9]!r}, expected {_MAGIC!r} and "
            f"{_HEADER.size} header bytes (found {found} bytes in all)"
        )
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != _VERSION or code not in _DTYPES:
        raise DataError(
            f"{path} has index version {version} and dtype code {code}; only version {_VERSION} and codes "
            f"1 to 8 are known"
        )
    header = IndexHeader(np.dtype(_DTYPES[code]), sequences, bounds)
    # megatron-core's multimodal builder appends one mode byte a sequence; the rest of the file is the same.
    if bounds < 1 or found not in (header.idx_bytes, header.idx_bytes + sequences):
        raise DataError(
            f"{path} is truncated or damaged: found {found:,} bytes, expected {header.idx_bytes:,} for "
            f"{sequences:,} sequences; copy it again, or run the preprocessing again"
        )
    return header


def document_lengths(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each document of an .idx file, its sequences together. Needs no .bin."""
    header = read_header(path)
    with path.open("rb") as stream:
        stream.seek(_HEADER.size)
        lengths = np.fromfile(stream, np.int32, header.sequences)
        stream.seek(8 * header.sequences, os.SEEK_CUR)
        bounds = np.fromfile(stream, np.int64, header.bounds)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if not 0 <= bounds.min() <= bounds.max() <= header.sequences:
        raise DataError(
            f"{path} is damaged: its documents reach beyond its {header.sequences:,} sequences; run the "
            f"preprocessing again"
        )
    return np.diff(ends[bounds])


@dataclass(frozen=True)
class ShardSummary:
    """What IndexedWriter.finalize wrote."""

    documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class IndexedWriter:
    """Writes one shard, document after document, keeping 12 bytes a sequence in memory.

    Nothing is visible at `prefix` until finalize(); leaving the `with` block without it removes the partial
    file.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any] | type[np.number[Any]]) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise ValueError(f"the .idx format cannot name dtype {self.dtype}")
        self._lengths = array("i")
        self._bounds = array("q", [0])
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._bin_partial = partial_path(bin_path(self.prefix))
        self._idx_partial = partial_path(idx_path(self.prefix))
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[bytes] | None = self._bin_partial.open("wb")

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def add_document(self, ids: Sequence[int] | TokenArray, lengths: Sequence[int] | None = None) -> None:
        """Append one document; `lengths` are those of its sentences (default: one sequence)."""
        tokens = np.asarray(ids)
        sequence_lengths = np.asarray([tokens.size] if lengths is None else lengths, dtype=np.int64)
        self.add_documents(tokens, sequence_lengths, np.array([sequence_lengths.size]))

    def add_documents(self, ids: TokenArray, lengths: TokenArray, sequences: TokenArray) -> None:
        """Append many documents at once: all their ids, the length of each sequence, sequences per document."""
        assert int(lengths.sum()) == ids.size, "sequence lengths do not add up to the number of ids"
        self.add_tokens(ids)
        self.end_documents(lengths, sequences)

    def add_tokens(self, ids: TokenArray) -> None:
        """Append ids of documents that a later end_documents() describes: for those too long to hold."""
        if ids.size and ids.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(ids.min()), int(ids.max())
            if low < limits.min or high > limits.max:
                raise DataError(
                    f"token ids {low} to {high} do not fit {self.dtype} in {bin_path(self.prefix)}"
                )
        assert self._stream is not None, "the writer is closed"
        data = np.ascontiguousarray(ids, dtype=self.dtype).data.cast("B") if ids.size else b""
        with self._explained(bin_path(self.prefix), self.bin_bytes + len(data)):
            self._stream.write(data)
        self._digest.update(data)
        self._tokens += ids.size

    def end_documents(self, lengths: TokenArray, sequences: TokenArray) -> None:
        """Describe the ids added since the last call, as in add_documents()."""
        assert int(sequences.sum()) == lengths.size, "documents do not add up to the number of sequences"
        if lengths.size and int(lengths.max()) > _MAX_SEQUENCE:
            raise DataError(
                f"a document of {int(lengths.max()):,} tokens cannot be written to "
                f"{bin_path(self.prefix)}: the format allows {_MAX_SEQUENCE:,}; split it"
            )
        bounds = len(self._lengths) + np.cumsum(sequences, dtype=np.int64)
        self._lengths.frombytes(np.ascontiguousarray(lengths, dtype=np.int32).tobytes())
        self._bounds.frombytes(bounds.tobytes())

    def finalize(self) -> ShardSummary:
        """Flush both files to the disk and rename them into place, the .idx last."""
        assert self._stream is not None, "the writer is closed"
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        bounds = np.frombuffer(self._bounds, dtype=np.int64)
        assert int(lengths.sum(dtype=np.int64)) == self._tokens, "tokens were added and not described"
        header = IndexHeader(self.dtype, lengths.size, bounds.size)
        offsets = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        head = _HEADER.pack(_MAGIC, _VERSION, _CODES[self.dtype], lengths.size, bounds.size)
        digest = hashlib.sha256()
        bin_final, idx_final = bin_path(self.prefix), idx_path(self.prefix)
        with self._explained(bin_final, self.bin_bytes):
            flush_to_disk(self._stream)
            self._stream.close()
        with self._explained(idx_final, header.idx_bytes), self._idx_partial.open("wb") as stream:
            for part in (head, lengths.data, offsets.data, bounds.data):
                stream.write(part)
                digest.update(part)
            flush_to_disk(stream)
        self._stream = None
        # An .idx in place always describes the .bin in place: an older one must go before its .bin does.
        idx_final.unlink(missing_ok=True)
        publish(self._bin_partial, bin_final)
        publish(self._idx_partial, idx_final)
        return ShardSummary(
            documents=bounds.size - 1,
            sequences=lengths.size,
            tokens=self._tokens,
            bin_bytes=self.bin_bytes,
            idx_bytes=header.idx_bytes,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=digest.hexdigest(),
        )

    @property
    def bin_bytes(self) -> int:
        return self._tokens * self.dtype.itemsize

    def abort(self) -> None:
        """Drop what is not finalized."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(
                OSError
            ):  # a full disk fails the last flush too; the bytes are dropped anyway
                stream.close()
        self._bin_partial.unlink(missing_ok=True)
        self._idx_partial.unlink(missing_ok=True)

    def _explained(self, path: Path, needed_bytes: int) -> contextlib.AbstractContextManager[None]:
        return explained_disk_errors(path, needed_bytes, clean_up=self.abort)


class IndexedReader:
    """One shard, memory-mapped. Opening reads the headers and the last entry of each table, nothing else."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._idx_path, self._bin_path = idx_path(self.prefix), bin_path(self.prefix)
        self.header = read_header(self._idx_path)
        self.dtype = self.header.dtype
        self.sequences = self.header.sequences
        self.documents = self.header.bounds - 1
        if self.document_bounds[-1] != self.sequences:
            raise DataError(
                f"{self._idx_path} is damaged: its documents end at sequence "
                f"{int(self.document_bounds[-1]):,} of {self.sequences:,}; run the preprocessing again"
            )
        # The offsets are running sums, so the last one says what all lengths add up to.
        last = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if self.sequences else 0
        self.bin_bytes = last
        self.tokens = last // self.dtype.itemsize
        self._check_bin()

    def __reduce__(self) -> tuple[type[IndexedReader], tuple[Path]]:
        return IndexedReader, (self.prefix,)  # pickling a map would copy the file

    def _check_bin(self) -> None:
        try:
            found = self._bin_path.stat().st_size
        except FileNotFoundError:
            raise DataError(
                f"missing shard file {self._bin_path}: restore it, or run the preprocessing again"
            ) from None
        if found != self.bin_bytes:
            raise DataError(
                f"{self._bin_path} has {found:,} bytes but {self._idx_path.name} describes "
                f"{self.bin_bytes:,} ({self.tokens:,} tokens of {self.dtype}): it is truncated, or the two "
                "files were made by different runs or tokenizers; copy both again, or run the "
                "preprocessing again"
            )

    def _table(self, dtype: type[np.number[Any]], offset: int, count: int) -> TokenArray:
        return np.frombuffer(self._idx_map, dtype=dtype, count=count, offset=offset)

    @cached_property
    def _idx_map(self) -> TokenArray:
        return np.asarray(np.memmap(self._idx_path, mode="r"))

    @cached_property
    def lengths(self) -> TokenArray:
        """Tokens of each sequence, int32."""
        return self._table(np.int32, _HEADER.size, self.sequences)

    @cached_property
    def offsets(self) -> TokenArray:
        """Byte offset of each sequence in the .bin, int64."""
        return self._table(np.int64, _HEADER.size + 4 * self.sequences, self.sequences)

    @cached_property
    def document_bounds(self) -> TokenArray:
        """First sequence of each document, and one past the last sequence; int64, documents + 1 entries."""
        return self._table(np.int64, _HEADER.size + 12 * self.sequences, self.header.bounds)

    @cached_property
    def ids(self) -> TokenArray:
        """All token ids of the shard, mapped."""
        self._check_bin()  # again: reading a map of a file that has shrunk since would kill the process
        if not self.tokens:
            return np.empty(0, self.dtype)
        # A plain array over the map: slicing numpy's memmap class costs ten times more.
        return np.asarray(np.memmap(self._bin_path, dtype=self.dtype, mode="r"))

    def document(self, index: int) -> TokenArray:
        """Ids of one document, all its sequences."""
        first, last = (int(bound) for bound in self.document_bounds[index : index + 2])
        start = int(self.offsets[first]) // self.dtype.itemsize if first < self.sequences else self.tokens
        return self.ids[start : start + int(self.lengths[first:last].sum())]

    def deep_check(self) -> None:
        """Read every table: lengths, offsets and bounds must agree entry by entry."""
        offsets = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        agree = np.array_equal(offsets[:-1], self.offsets[1:]) and bool((self.lengths >= 0).all())
        if not agree or bool((np.diff(self.document_bounds) < 0).any()):
            raise DataError(
                f"{self._idx_path} is damaged inside: its tables disagree; run the preprocessing again"
            )
