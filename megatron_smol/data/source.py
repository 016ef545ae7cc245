"""One source of training tokens: all its shards as one token space, in a folder or behind an address.

The loader reads windows of it (`read_windows`); the order of those windows is data/order.py's. Opening
compares the sizes of all files with the manifest, so a missing or truncated shard is named before training
starts; shards are opened when they are first read, and few at a time (data/stores.py).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from megatron_smol.data.indexed import IndexedReader, TokenArray
from megatron_smol.data.manifest import Manifest, ShardRecord, locate
from megatron_smol.data.stores import (
    FileFacts,
    LocalStore,
    Range,
    Store,
    is_remote,
    open_remote,
    wrong_size,
)
from megatron_smol.errors import DataError

# Memory maps that `shards` keeps: for those who read documents; windows are read without any.
_MAPPED_SHARDS = 64


class TokenizerIdentity(Protocol):
    """What a source needs to know of a tokenizer to tell whether it was made with it."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...


def load_source(path: str | Path) -> TokenSource:
    """Open a folder with a manifest, a Megatron prefix (with or without `_text_document`), or an address such
    as s3://bucket/source."""
    store, manifest, prefix = open_store(path)
    if manifest is not None:
        check_sizes(store, manifest)
        return TokenSource(manifest.source, store, manifest)
    assert prefix is not None
    return TokenSource(prefix.name, store, None, [IndexedReader(prefix)])


def open_store(path: str | Path) -> tuple[Store, Manifest | None, Path | None]:
    """(where the files lie, their manifest, None), or (folder, None, prefix) of a bare Megatron pair."""
    if is_remote(path):
        return (*open_remote(str(path)), None)
    where, manifest = locate(path)
    if manifest is None:
        return LocalStore(where.parent), None, where
    return LocalStore(where), manifest, None


def shard_files(record: ShardRecord) -> tuple[FileFacts, FileFacts]:
    """The .bin and the .idx of a shard."""
    return (
        FileFacts(f"{record.prefix}.bin", record.bin_bytes, record.bin_sha256),
        FileFacts(f"{record.prefix}.idx", record.idx_bytes, record.idx_sha256),
    )


def check_sizes(store: Store, manifest: Manifest) -> None:
    """Refuse a source with a file that is missing or not as long as its manifest says."""
    for _, problem in size_problems(store, manifest):
        raise DataError(problem)


def size_problems(store: Store, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it), for every file that is missing or of another size."""
    sizes = store.sizes()
    if sizes is None:
        return
    for record in manifest.shards:
        for file in shard_files(record):
            found, where = sizes.get(file.name), store.where(file.name)
            if found is None:
                yield (
                    file.name,
                    f"missing shard file {where}: restore it, or run the preprocessing again",
                )
            elif found != file.bytes:
                yield file.name, wrong_size(where, found, file.bytes)


class TokenSource:
    """The tokens of all shards, one after another: token i of the source is `read(i, 1)[0]`.

    `readers` are the shards of a source without a manifest.
    """

    def __init__(
        self, name: str, store: Store, manifest: Manifest | None, readers: Sequence[IndexedReader] = ()
    ) -> None:
        self.name = name
        self.manifest = manifest
        self.store = store
        sizes: list[int]
        if manifest is not None:
            self.dtype = np.dtype(manifest.dtype)
            self._files = [shard_files(record)[0] for record in manifest.shards]
            self.documents = sum(record.documents for record in manifest.shards)
            sizes = [record.tokens for record in manifest.shards]
            self.shards: Sequence[IndexedReader] = _Shards(store, manifest)
        else:
            self.dtype = readers[0].dtype
            self._files = [FileFacts(f"{reader.prefix.name}.bin", reader.bin_bytes) for reader in readers]
            self.documents = sum(reader.documents for reader in readers)
            sizes = [reader.tokens for reader in readers]
            self.shards = tuple(readers)
        # _starts[k] is the first token of shard k; one more entry for the end.
        self._starts = list(accumulate(sizes, initial=0))
        self.tokens = self._starts[-1]
        if not self.tokens:
            raise DataError(f"source '{name}' holds no tokens")
        for file, tokens in zip(self._files, sizes, strict=True):
            if file.bytes != tokens * self.dtype.itemsize:
                raise DataError(
                    f"the shards of source '{name}' differ in type: {store.where(file.name)} has {file.bytes:,} bytes "
                    f"for {tokens:,} tokens, but its tokens are {self.dtype}; preprocess it again"
                )

    @property
    def eod_id(self) -> int | None:
        """The token after each document; None when no manifest says it."""
        return self.manifest.tokenizer.eod_id if self.manifest and self.manifest.append_eod else None

    @property
    def packed_length(self) -> int | None:
        """Tokens of a packed window (data/packing.py); None when documents lie end to end."""
        packed = self.manifest.packed if self.manifest else None
        return int(packed["length"]) if packed else None

    @property
    def identity(self) -> dict[str, int | str | None]:
        """What a checkpoint remembers of the data: its size, and a hash over the shards' (None without a manifest)."""
        if self.manifest is None:
            return {"tokens": self.tokens, "sha256": None}
        shards = "".join(record.bin_sha256 for record in self.manifest.shards)
        return {"tokens": self.tokens, "sha256": hashlib.sha256(shards.encode()).hexdigest()}

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens [start, start + count), in an array of their own."""
        if count < 0:
            raise IndexError(f"{count} tokens of source '{self.name}'")
        into = np.empty(count, self.dtype)
        self.store.read(self._ranges(start, into))
        return into

    def read_windows(self, starts: Sequence[int], into: Sequence[TokenArray]) -> None:
        """Fill into[i] with the tokens from starts[i] on, all in one go; its type is the source's."""
        ranges: list[Range] = []
        for start, row in zip(starts, into, strict=True):
            ranges += self._ranges(start, row)
        self.store.read(ranges)

    def _ranges(self, start: int, into: TokenArray) -> list[Range]:
        """The bytes of `into`, which begins at token `start`, shard by shard."""
        item, stop = self.dtype.itemsize, start + into.size
        if start < 0 or stop > self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of source '{self.name}', which has {self.tokens}")
        assert into.dtype == self.dtype
        if start == stop:
            return []
        data, done, ranges = into.data.cast("B"), 0, []
        shard = bisect_right(self._starts, start) - 1
        while stop > (end := self._starts[shard + 1]):
            if end > start:  # a shard may be empty
                size = (end - start) * item
                offset = (start - self._starts[shard]) * item
                ranges.append(Range(self._files[shard], offset, data[done : done + size]))
                start, done = end, done + size
            shard += 1
        ranges.append(Range(self._files[shard], (start - self._starts[shard]) * item, data[done:]))
        return ranges

    def check_tokenizer(self, tokenizer: TokenizerIdentity) -> None:
        """Refuse tokens that another tokenizer made. A bare Megatron prefix does not say, and passes."""
        made_with = self.manifest.tokenizer if self.manifest else None
        if made_with and made_with.sha256 != tokenizer.sha256:
            raise DataError(
                f"source '{self.name}' was made with another tokenizer: its manifest says {made_with.name} "
                f"(vocabulary {made_with.vocab_size:,}, {made_with.sha256[:12]}), this run uses "
                f"{tokenizer.name} (vocabulary {tokenizer.vocab_size:,}, {tokenizer.sha256[:12]}); name "
                f"the right tokenizer in the recipe, or preprocess the source again"
            )

    def deep_check(self) -> None:
        """Read every byte, as `smol data verify --deep` does; raises for the first file that is damaged."""
        from megatron_smol.data.verify import damages

        for damage in damages(self.store, self.manifest, self.shards, deep=True):
            raise DataError(damage.problem)


class _Shards(Sequence[IndexedReader]):
    """The shards of a source, opened (and fetched) when asked for."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._manifest = manifest
        self._open = lru_cache(_MAPPED_SHARDS)(
            lambda index: open_shard(store, manifest.shards[index], manifest)
        )

    def __len__(self) -> int:
        return len(self._manifest.shards)

    @overload
    def __getitem__(self, index: int) -> IndexedReader: ...
    @overload
    def __getitem__(self, index: slice) -> list[IndexedReader]: ...
    def __getitem__(self, index: int | slice) -> IndexedReader | list[IndexedReader]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._open(index % len(self))


def open_shard(store: Store, record: ShardRecord, manifest: Manifest) -> IndexedReader:
    """Map a shard, and check that its index is the one the manifest describes."""
    for file in shard_files(record):
        local = store.local(file)
    shard = IndexedReader(local.with_suffix(""))
    found = (shard.tokens, shard.documents, shard.sequences, shard.dtype.name)
    expected = (record.tokens, record.documents, record.sequences, manifest.dtype)
    if found != expected:
        raise DataError(
            f"{local} is not the one its manifest describes: found {found[0]:,} tokens in "
            f"{found[1]:,} documents of {found[3]}, expected {expected[0]:,} in {expected[1]:,} of "
            f"{expected[3]}; restore the shard, or run the preprocessing of source '{manifest.source}' again"
        )
    return shard
