"""`smol data pack`: a source whose windows hold whole documents, by best-fit-decreasing packing.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling": documents longer than a window are cut into
whole windows and a rest; the pieces, longest first, each go to the fullest window that still has room. The
result is an ordinary source for the loader, with `packed` in its manifest: window k is tokens [k L, (k + 1) L),
filled up with end-of-document ids, which are documents of their own in the .idx.

What carries no loss (`ignored_labels`): the padding, and the last label of each window, since the token after
it belongs to another window's document. Each input shard is packed for itself, so memory is bounded by a
shard's tables, and a killed run goes on with the next shard.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_smol import __version__
from megatron_smol.data.files import PARTIAL, check_room, require_folder, write_whole
from megatron_smol.data.indexed import IndexedReader, IndexedWriter, TokenArray, document_lengths, idx_path
from megatron_smol.data.manifest import FOLDER_MANIFEST, InputRecord, Manifest, ShardRecord, read_manifest
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.errors import DataError, UserError

if TYPE_CHECKING:
    from megatron_smol.recipe.plan import StagePlan

_WORK = ".pack"
_PLAN = "plan.json"
_WRITTEN_TOKENS = 4 << 20  # at once


# --- what the loader asks ----------------------------------------------------------------------------------


def check_packed(stage: StagePlan, sources: Mapping[str, TokenSource]) -> None:
    """Refuse a stage that would cut the windows of a packed source."""
    for name, weight in stage.weights.items():
        packed = sources[name].packed_length
        if weight and packed and packed != stage.seq_length:
            raise UserError(
                f"stage '{stage.name}' reads source '{name}' in windows of {stage.seq_length}, but it is packed for "
                f"{packed}: set seq_length: {packed}, or pack it again with `smol data pack --length "
                f"{stage.seq_length}`"
            )


def ignored_labels(windows: TokenArray, eod_id: int) -> NDArray[np.bool_]:
    """Which labels of packed windows carry no loss. windows: [b, s + 1] ids; returns [b, s] bool.

    Padding is what follows the first of the end-of-document ids that a window ends with.
    """
    inputs = windows[:, :-1]
    trailing = np.logical_and.accumulate(inputs[:, ::-1] == eod_id, axis=1)[:, ::-1]
    ignored = np.ones(inputs.shape, bool)
    # The label at j is the input at j + 1; it is padding when the input at j is an end of document too.
    ignored[:, :-1] = trailing[:, :-1]
    return ignored


# --- the plan of a shard -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Pieces of documents in the order in which they are written: window after window."""

    starts: NDArray[np.int64]  # first token of each piece in the input shard
    lengths: NDArray[np.int64]
    windows: NDArray[np.int64]  # which window each piece is in, ascending
    count: int  # windows


def pack(lengths: NDArray[np.int64], window: int) -> Packed:
    """Place documents of these lengths, which lie end to end, into windows of `window` tokens."""
    pieces, document = cut(lengths, window)
    ends = np.cumsum(lengths)
    order_in_document = np.arange(len(pieces)) - np.searchsorted(document, document)
    starts = (ends - lengths)[document] + order_in_document * window
    windows = best_fit_decreasing(pieces, window)
    order = np.argsort(windows, kind="stable")  # inside a window, in the order of the input
    count = int(windows.max()) + 1 if windows.size else 0
    return Packed(starts[order], pieces[order], windows[order], count)


def cut(lengths: NDArray[np.int64], window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(length of each piece, its document): whole windows of a long document, then its rest."""
    count = -(-lengths // window)
    document = np.repeat(np.arange(len(lengths)), count)
    pieces = np.full(len(document), window, dtype=np.int64)
    last = np.cumsum(count)[count > 0] - 1
    pieces[last] = (lengths - (count - 1) * window)[count > 0]
    return pieces, document


def best_fit_decreasing(pieces: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """The window of each piece. No piece is longer than `window`; ties go to the first piece and the newest window."""
    room: list[list[int]] = [[] for _ in range(window + 1)]  # windows by the tokens they have left
    free = 0  # bit r is set where room[r] is not empty
    placed = np.empty(len(pieces), np.int64)
    opened = 0
    for index in np.argsort(-pieces, kind="stable").tolist():
        size = int(pieces[index])
        fitting = free >> size
        if fitting:  # the lowest bit is the tightest fit
            left = size + (fitting & -fitting).bit_length() - 1
            chosen = room[left].pop()
            if not room[left]:
                free &= ~(1 << left)
        else:
            left, chosen, opened = window, opened, opened + 1
        placed[index] = chosen
        left -= size
        if left:
            room[left].append(chosen)
            free |= 1 << left
    return placed


# --- files -------------------------------------------------------------------------------------------------


def pack_source(path: str | Path, length: int, output: Path) -> Manifest:
    """Write `path`, packed for windows of `length` tokens, to the folder `output`; returns its manifest.

    The same call again continues what a kill interrupted, or returns at once when all is done. Output depends
    on the source and the length only.
    """
    from rich.console import Console
    from rich.progress import Progress

    source = load_source(path)
    manifest = _require_packable(source, path, length, output)
    plan = json.dumps({"source": source.identity, "length": length, "version": 1})
    if (output / FOLDER_MANIFEST).exists():
        done = read_manifest(output / FOLDER_MANIFEST)
        if done.packed and done.packed["length"] == length and done.inputs == _inputs(source):
            load_source(output)  # whole?
            return done
        raise UserError(f"{output} holds another source; choose another --output, or remove it")
    work = _prepare(output, plan)
    check_room(output, manifest.tokens * source.dtype.itemsize)
    records = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"packing {source.name}", total=manifest.tokens)
        for number, record in enumerate(manifest.shards):
            last = number == len(manifest.shards) - 1
            records.append(_pack_shard(source, number, length, output, work, last))
            bar.advance(task, record.tokens)
    made = _manifest(source, manifest, length, records)
    made.write(output / FOLDER_MANIFEST)
    shutil.rmtree(work)
    return made


def _require_packable(source: TokenSource, path: str | Path, length: int, output: Path) -> Manifest:
    if length < 2:
        raise UserError(f"--length must be at least 2 tokens, found {length}")
    if source.manifest is None or source.eod_id is None:
        raise DataError(
            f"{path} does not say where its documents end: packing needs a source that `smol preprocess` made with "
            f"--append-eod"
        )
    if source.packed_length:
        raise UserError(
            f"{path} is packed already (for {source.packed_length}); pack the source it was made from"
        )
    require_folder(output)
    return source.manifest


def _prepare(output: Path, plan: str) -> Path:
    """The work folder, emptied unless it holds the same command's work."""
    work = output / _WORK
    written = work / _PLAN
    if not written.exists() and list(output.glob("*.bin")):
        raise UserError(f"{output} holds shards that this command did not make; choose another --output")
    work.mkdir(parents=True, exist_ok=True)
    if not written.exists() or written.read_text() != plan:
        for file in (*work.iterdir(), *output.glob("shard-*")):
            file.unlink()
        write_whole(written, plan)
    for partial in (*output.glob(f"*{PARTIAL}"), *work.glob(f"*{PARTIAL}")):
        partial.unlink()
    return work


def _pack_shard(
    source: TokenSource, number: int, length: int, output: Path, work: Path, last: bool
) -> dict[str, Any]:
    """Pack one input shard into one output shard; returns its record and counts, read back if it is done."""
    path = work / f"{number:05d}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    shard = source.shards[number]
    lengths = document_lengths(idx_path(shard.prefix))
    packed = pack(lengths, length)
    assert source.eod_id is not None
    with IndexedWriter(output / f"shard-{number:05d}", source.dtype) as writer:
        for ids, sizes in _runs(shard, packed, length, source.eod_id):
            writer.add_documents(ids, sizes, np.ones(len(sizes), np.int64))
        if last:  # a window is read with the token after it, so the last one needs one too
            writer.add_document([source.eod_id])
        summary = writer.finalize()
    result = {
        "shard": {"prefix": f"shard-{number:05d}", **dataclasses.asdict(summary)},
        "documents": int((lengths > 0).sum()),
        "cut_documents": int((lengths > length).sum()),
        "padding_tokens": packed.count * length - int(lengths.sum()) + last,
    }
    write_whole(path, json.dumps(result))
    return result


def _runs(
    shard: IndexedReader, packed: Packed, window: int, eod_id: int
) -> Iterator[tuple[TokenArray, NDArray[np.int64]]]:
    """(ids, length of each document) of some windows at a time, padding included."""
    at_once = max(1, _WRITTEN_TOKENS // window)
    bounds = np.searchsorted(packed.windows, np.arange(0, packed.count + at_once, at_once))
    for begin, end in itertools.pairwise(bounds.tolist()):
        first = int(packed.windows[begin])
        inside = packed.windows[begin:end] - first
        lengths = packed.lengths[begin:end]
        count = int(inside[-1]) + 1
        used = np.bincount(inside, weights=lengths, minlength=count).astype(np.int64)
        ids = np.full(count * window, eod_id, shard.dtype)
        # Where each piece begins: its window's start and what lies before it in the window.
        before = np.cumsum(lengths) - lengths
        place = inside * window + before - before[np.searchsorted(inside, inside)]
        for to, start, size in zip(
            place.tolist(), packed.starts[begin:end].tolist(), lengths.tolist(), strict=True
        ):
            ids[to : to + size] = shard.ids[start : start + size]
        padded = np.flatnonzero(used < window)
        after = np.searchsorted(inside, padded, side="right")
        yield ids, np.insert(lengths, after, (window - used)[padded])


def _inputs(source: TokenSource) -> tuple[InputRecord, ...]:
    """The packed source's inputs are the shards it was made from."""
    assert source.manifest is not None
    return tuple(
        InputRecord(path=source.store.where(f"{s.prefix}.bin"), bytes=s.bin_bytes, sha256=s.bin_sha256)
        for s in source.manifest.shards
    )


def _manifest(source: TokenSource, before: Manifest, length: int, results: list[dict[str, Any]]) -> Manifest:
    shards = tuple(ShardRecord(**result["shard"]) for result in results)
    counts = {
        name: sum(result[name] for result in results)
        for name in ("documents", "cut_documents", "padding_tokens")
    }
    made = before.model_copy(
        update={
            "tokens": sum(shard.tokens for shard in shards),
            "documents": sum(shard.documents for shard in shards),
            "sentences": None,
            "shards": shards,
            "inputs": _inputs(source),
            "versions": before.versions
            | {"megatron_smol": __version__, "numpy": importlib.metadata.version("numpy")},
            "packed": {"length": length, **counts},
        }
    )
    assert made.tokens == before.tokens + counts["padding_tokens"], "a token was lost or written twice"
    return made
