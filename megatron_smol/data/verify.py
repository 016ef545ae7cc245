"""`smol data verify`: are the files of a source what their manifest says?

The fast check compares sizes, headers and counts and takes milliseconds a shard; the deep one reads every byte
once: checksums, index tables, ids below the vocabulary's size, documents that end with the end-of-document id.
All damage is found, not only the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from megatron_smol.data.indexed import IndexedReader, document_lengths, idx_path
from megatron_smol.data.manifest import Manifest, ShardRecord
from megatron_smol.data.source import open_shard, open_store, shard_files, size_problems
from megatron_smol.data.stores import FileFacts, Store, explained
from megatron_smol.errors import DataError, UserError

Advance = Callable[[int], None]  # bytes that are done


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: the file, and a sentence that says what and what to do."""

    file: str
    problem: str


@dataclass
class Verdict:
    """What was found in one source."""

    path: str
    source: str = ""
    tokens: int = 0
    shards: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)


def verify(paths: Sequence[str], deep: bool, as_json: bool) -> bool:
    """Check sources, or those of recipes (*.yaml), and print what was found; True when all is whole."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    verdicts = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for path in _sources(paths):
            task = bar.add_task(str(path), total=None)

            def total(size: int, task: Any = task) -> None:
                bar.update(task, total=size)

            def advance(size: int, task: Any = task) -> None:
                bar.advance(task, size)

            verdicts.append(verify_source(path, deep, total, advance))
            bar.remove_task(task)
    if as_json:
        found = {
            "deep": deep,
            "whole": not any(v.damages for v in verdicts),
            "sources": list(map(asdict, verdicts)),
        }
        print(json.dumps(found, indent=1))
    else:
        _print(verdicts, deep)
    return not any(verdict.damages for verdict in verdicts)


def verify_source(
    path: str, deep: bool, total: Advance = lambda _: None, advance: Advance = lambda _: None
) -> Verdict:
    """Check one source."""
    verdict = Verdict(str(path))
    try:
        store, manifest, prefix = open_store(path)
        if manifest is None:
            assert prefix is not None
            reader = IndexedReader(prefix)
            verdict.source, verdict.tokens, verdict.shards = prefix.name, reader.tokens, 1
            verdict.bytes = reader.bin_bytes + reader.header.idx_bytes
            readers: Sequence[IndexedReader] = [reader]
        else:
            verdict.source, verdict.tokens = manifest.source, manifest.tokens
            verdict.shards = len(manifest.shards)
            verdict.bytes = sum(shard.bin_bytes + shard.idx_bytes for shard in manifest.shards)
            readers = ()
        total(verdict.bytes)
        verdict.damages.extend(damages(store, manifest, readers, deep, advance))
    except DataError as error:
        verdict.damages.append(Damage(str(path), str(error)))
    return verdict


def damages(
    store: Store,
    manifest: Manifest | None,
    readers: Sequence[IndexedReader],
    deep: bool,
    advance: Advance = lambda _: None,
) -> Iterator[Damage]:
    """Everything that is wrong with a source; `readers` are its shards where it has no manifest."""
    if manifest is None:
        for reader in readers:
            if deep:
                yield from _caught(f"{reader.prefix.name}.idx", reader.deep_check)
        return
    tokens = sum(shard.tokens for shard in manifest.shards)
    if tokens != manifest.tokens:
        yield Damage(
            "manifest.json",
            f"the manifest of '{manifest.source}' says {manifest.tokens:,} tokens, its shards add up to {tokens:,}; "
            f"it was changed by hand: run the preprocessing again",
        )
    broken = dict(size_problems(store, manifest))
    for file, problem in broken.items():
        yield Damage(file, problem)

    def check(record: ShardRecord) -> list[Damage]:
        if any(file.name in broken for file in shard_files(record)):
            advance(record.bin_bytes + record.idx_bytes)
            return []
        return list(_shard_damages(store, record, manifest, deep, advance))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "verify") as pool:
        for found in pool.map(check, manifest.shards):
            yield from found


def _shard_damages(
    store: Store, record: ShardRecord, manifest: Manifest, deep: bool, advance: Advance
) -> Iterator[Damage]:
    """One shard whose files have the right sizes."""
    bin_file, idx_file = shard_files(record)
    before = len(found := list(_caught(idx_file.name, lambda: open_shard(store, record, manifest))))
    yield from found
    if not deep:
        advance(record.bin_bytes + record.idx_bytes)
        return
    yield from _changed(store, idx_file, _digest_only(store, idx_file, advance))
    ends: np.ndarray | None = None
    if not before:
        reader = open_shard(store, record, manifest)
        tables = list(_caught(idx_file.name, reader.deep_check))
        yield from tables
        if manifest.append_eod and not tables:
            ends = _ends(reader, manifest)
    yield from _caught_all(bin_file.name, lambda: _read_tokens(store, bin_file, manifest, ends, advance))


def _ends(reader: IndexedReader, manifest: Manifest) -> np.ndarray:
    """Where the last token of each document is; not of those that packing cut, which fill a window."""
    lengths = document_lengths(idx_path(reader.prefix))
    last = np.cumsum(lengths) - 1
    whole = lengths > 0
    if manifest.packed:
        whole &= lengths != manifest.packed["length"]
    return last[whole]


def _read_tokens(
    store: Store, file: FileFacts, manifest: Manifest, ends: np.ndarray | None, advance: Advance
) -> Iterator[Damage]:
    """Hash a .bin, and look at its ids on the way."""
    digest, dtype = hashlib.sha256(), np.dtype(manifest.dtype)
    highest, seen, open_ended, rest = -1, 0, 0, b""
    for block in store.blocks(file):
        digest.update(block)
        advance(len(block))
        data = rest + block if rest else block
        whole = len(data) - len(data) % dtype.itemsize
        rest = data[whole:]
        ids = np.frombuffer(data[:whole], dtype)
        if ids.size:
            highest = max(highest, int(ids.max()))
        if ends is not None:
            first, last = np.searchsorted(ends, [seen, seen + ids.size])
            open_ended += int((ids[ends[first:last] - seen] != manifest.tokenizer.eod_id).sum())
        seen += ids.size
    where = store.where(file.name)
    yield from _changed(store, file, digest.hexdigest())
    if highest >= (size := manifest.tokenizer.vocab_size):
        yield Damage(
            file.name, f"{where} holds id {highest}; the vocabulary ends at {size}; preprocess it again"
        )
    if open_ended:
        yield Damage(
            file.name,
            f"{where} has {open_ended:,} documents that do not end with the end-of-document id "
            f"{manifest.tokenizer.eod_id}, as its manifest says they do; preprocess it again",
        )


def _digest_only(store: Store, file: FileFacts, advance: Advance) -> str:
    digest = hashlib.sha256()
    for block in store.blocks(file):
        digest.update(block)
        advance(len(block))
    return digest.hexdigest()


def _changed(store: Store, file: FileFacts, found: str) -> Iterator[Damage]:
    if file.sha256 is not None and found != file.sha256:
        yield Damage(
            file.name,
            f"{store.where(file.name)} changed since it was written: sha256 {found[:12]}, the manifest says "
            f"{file.sha256[:12]}; restore it, or run the preprocessing again",
        )


def _caught(file: str, check: Callable[[], object]) -> Iterator[Damage]:
    """A check that raises, as a list of what it found."""
    try:
        with explained(file):
            check()
    except DataError as error:
        yield Damage(file, str(error))


def _caught_all(file: str, check: Callable[[], Iterator[Damage]]) -> Iterator[Damage]:
    try:
        with explained(file):
            yield from check()
    except DataError as error:
        yield Damage(file, str(error))


def _sources(paths: Sequence[str]) -> list[str]:
    """Paths of sources; a recipe stands for all of its own."""
    from megatron_smol.recipe.load import load_recipe

    found: list[str] = []
    for path in paths:
        if Path(path).suffix in (".yaml", ".yml"):
            found += [source.path for source in load_recipe(path).sources.values()]
        else:
            found.append(path)
    if not found:
        raise UserError("name at least one source folder, or a recipe")
    return list(dict.fromkeys(found))


def _print(verdicts: Sequence[Verdict], deep: bool) -> None:
    read = "every byte read" if deep else "sizes and headers"
    for verdict in verdicts:
        state = f"{len(verdict.damages)} damaged" if verdict.damages else "whole"
        print(
            f"{verdict.path}: {state} ({read}: {verdict.shards:,} shard(s), {verdict.tokens:,} tokens, "
            f"{decimal(verdict.bytes)})"
        )
        for damage in verdict.damages:
            print(f"error: {damage.problem}", file=sys.stderr)
