"""One source of training tokens: all its shards as one token space, memory-mapped.

The loader reads windows of it (`read`); the order of those windows is data/order.py's. Opening checks every
shard's sizes and headers against the manifest, so a missing or truncated file is named before training
starts.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_smol.data.files import sha256_file
from megatron_smol.data.indexed import IndexedReader, TokenArray, bin_path, idx_path
from megatron_smol.data.manifest import Manifest, ShardRecord, locate
from megatron_smol.errors import DataError


class TokenizerIdentity(Protocol):
    """What a source needs to know of a tokenizer to tell whether it was made with it."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...


def load_source(path: str | Path) -> TokenSource:
    """Open a folder with a manifest, or a Megatron prefix (with or without `_text_document`)."""
    where, manifest = locate(path)
    if manifest is None:
        return TokenSource(where.name, [IndexedReader(where)], None)
    readers = [_open_shard(where, record, manifest) for record in manifest.shards]
    return TokenSource(manifest.source, readers, manifest)


class TokenSource:
    """The tokens of all shards, one after another: token i of the source is `read(i, 1)[0]`."""

    def __init__(self, name: str, shards: Sequence[IndexedReader], manifest: Manifest | None) -> None:
        if not shards or not any(shard.tokens for shard in shards):
            raise DataError(f"source '{name}' holds no tokens")
        if len({shard.dtype for shard in shards}) > 1:
            mixed = ", ".join(f"{shard.prefix} {shard.dtype}" for shard in shards)
            raise DataError(f"the shards of source '{name}' differ in type: {mixed}; preprocess it again")
        self.name = name
        self.manifest = manifest
        self.shards = tuple(shards)
        self.dtype = shards[0].dtype
        self.documents = sum(shard.documents for shard in shards)
        # starts[k] is the first token of shard k; one more entry for the end.
        ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._starts: list[int] = [0, *ends.tolist()]
        self.tokens = self._starts[-1]

    @property
    def eod_id(self) -> int | None:
        """The token after each document; None when no manifest says it."""
        return self.manifest.tokenizer.eod_id if self.manifest and self.manifest.append_eod else None

    @property
    def identity(self) -> dict[str, int | str | None]:
        """What a checkpoint remembers of the data: its size, and a hash over the shards' (None without a manifest)."""
        if self.manifest is None:
            return {"tokens": self.tokens, "sha256": None}
        shards = "".join(record.bin_sha256 for record in self.manifest.shards)
        return {"tokens": self.tokens, "sha256": hashlib.sha256(shards.encode()).hexdigest()}

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens [start, start + count): a view of the file where they lie in one shard, else a copy."""
        stop = start + count
        if start < 0 or count < 0 or stop > self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of source '{self.name}', which has {self.tokens}")
        shard = bisect_right(self._starts, start) - 1
        parts = []
        while start < stop:
            base, end = self._starts[shard], min(stop, self._starts[shard + 1])
            parts.append(self.shards[shard].ids[start - base : end - base])
            start, shard = end, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.dtype)])

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
        """Read every byte: checksums against the manifest, the index tables, ids below the vocabulary's size."""
        for shard in self.shards:
            shard.deep_check()
        if self.manifest is None:
            return
        vocab_size = self.manifest.tokenizer.vocab_size
        for shard, record in zip(self.shards, self.manifest.shards, strict=True):
            hashes = {bin_path(shard.prefix): record.bin_sha256, idx_path(shard.prefix): record.idx_sha256}
            for path, expected in hashes.items():
                if (found := sha256_file(path)) != expected:
                    raise DataError(
                        f"{path} changed since it was written: sha256 {found[:12]}, the manifest says "
                        f"{expected[:12]}; restore it, or run the preprocessing again"
                    )
            if shard.tokens and (highest := int(shard.ids.max())) >= vocab_size:
                raise DataError(
                    f"{bin_path(shard.prefix)} holds id {highest}; the vocabulary ends at {vocab_size}"
                )


def _open_shard(folder: Path, record: ShardRecord, manifest: Manifest) -> IndexedReader:
    shard = IndexedReader(folder / record.prefix)
    found = (shard.tokens, shard.documents, shard.sequences, shard.dtype.name)
    expected = (record.tokens, record.documents, record.sequences, manifest.dtype)
    if found != expected:
        raise DataError(
            f"{idx_path(shard.prefix)} is not the one its manifest describes: found {found[0]:,} tokens in "
            f"{found[1]:,} documents of {found[3]}, expected {expected[0]:,} in {expected[1]:,} of "
            f"{expected[3]}; restore the shard, or run the preprocessing of source '{manifest.source}' again"
        )
    return shard
