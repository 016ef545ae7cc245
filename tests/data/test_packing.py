"""`smol data pack`: windows of whole documents, nothing lost, padding without loss, the same bytes every time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data.indexed import document_lengths
from megatron_smol.data.packing import best_fit_decreasing, cut, ignored_labels, pack, pack_source
from megatron_smol.data.source import load_source
from megatron_smol.data.verify import verify_source
from megatron_smol.errors import DataError, UserError
from tests.data.test_source import write_source
from tests.tiny import environment, smol

EOD = 3
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, window=st.integers(2, 16))
def test_best_fit_decreasing_is_the_papers(lengths: list[int], window: int) -> None:
    """Against a direct search: the fullest window with room for the piece, else a new one."""
    pieces, _ = cut(np.array(lengths), window)
    placed = best_fit_decreasing(pieces, window)
    room: list[int] = []
    opened: dict[int, int] = {}
    for piece in sorted(range(len(pieces)), key=lambda i: (-pieces[i], i)):
        fitting = [left for left in room if left >= pieces[piece]]
        tightest = min(fitting, default=window)
        if fitting:
            room.remove(tightest)
        room.append(tightest - int(pieces[piece]))
        used = opened.setdefault(int(placed[piece]), 0)
        assert window - used == tightest, "another window was fuller and had room"
        opened[int(placed[piece])] = used + int(pieces[piece])
    assert sorted(opened) == list(range(len(opened)))
    assert sorted(window - used for used in opened.values()) == sorted(room)


@settings(deadline=None)
@given(lengths=LENGTHS, window=st.integers(2, 16))
def test_pieces_cover_every_token_once_and_only_long_documents_are_cut(
    lengths: list[int], window: int
) -> None:
    packed = pack(np.array(lengths), window)
    spans = sorted(zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True))
    assert [start for start, _ in spans] == np.cumsum([0, *(size for _, size in spans)]).tolist()[:-1]
    assert sum(size for _, size in spans) == sum(lengths)
    starts = dict(spans)
    begin = 0
    for length in lengths:
        expected = [window] * (length // window) + ([length % window] if length % window else [])
        for size in expected:
            assert starts[begin] == size
            begin += size
    assert np.bincount(packed.windows, weights=packed.lengths).max() <= window
    assert (np.diff(packed.windows) >= 0).all() and packed.count == packed.windows[-1] + 1


def shards_of(documents: list[list[int]], count: int) -> list[list[list[int]]]:
    return [documents[i::count] for i in range(count)]


def random_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[*random.integers(4, 999, random.integers(0, longest)).tolist(), EOD] for _ in range(count)]


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 30),
    longest=st.integers(1, 50),
    window=st.integers(2, 16),
    shards=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_packed_source_holds_the_documents_and_padding(
    count: int, longest: int, window: int, shards: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    documents = random_documents(count, longest, seed)
    write_source(folder / "plain", shards_of(documents, min(shards, count)))
    manifest = pack_source(folder / "plain", window, folder / "packed")
    assert verify_source(str(folder / "packed"), deep=True).damages == []
    source = load_source(folder / "packed")
    assert source.packed_length == window and source.tokens % window == 1
    assert all(record.tokens % window == 0 for record in manifest.shards[:-1])
    assert manifest.packed is not None and manifest.packed["documents"] == count
    assert manifest.packed["cut_documents"] == sum(len(d) > window for d in documents)
    windows = source.read(0, source.tokens - 1).reshape(-1, window)
    found, padding = [], 1
    for shard in source.shards:
        lengths, place = document_lengths(shard.prefix.with_name(shard.prefix.name + ".idx")), 0
        ids = shard.ids.tolist()
        for length in lengths.tolist():
            assert place % window + length <= window, "a piece reaches over the end of its window"
            found.append(ids[place : place + length])
            place += length
    pieces = sorted(d[i : i + window] for d in documents for i in range(0, len(d), window))
    for piece in pieces:
        found.remove(piece)
    padding = sum(map(len, found))
    assert padding == manifest.packed["padding_tokens"] and {t for p in found for t in p} <= {EOD}
    # Labels that carry loss: every token of a document, but the first of its window.
    rows = np.stack([source.read(i * window, window + 1) for i in range(len(windows))])
    real = (~ignored_labels(rows, EOD)).sum()
    lonely = sum(piece == [EOD] for piece in pieces)  # a document of nothing but its end, when it comes last
    assert sum(map(len, pieces)) - len(windows) - lonely <= real <= sum(map(len, pieces)) - len(windows)


def test_padding_and_seams_carry_no_loss() -> None:
    e = EOD
    rows = np.array([[7, 8, e, 9, e, e, e, 5], [7, 8, 9, 7, 8, 9, 8, 5], [7, e, e, 9, 9, 9, e, 5], [e] * 8])
    assert ignored_labels(rows, e).tolist() == [
        [False, False, False, False, True, True, True],
        [False, False, False, False, False, False, True],
        [False, False, False, False, False, False, True],
        [True] * 7,
    ]


def test_packing_wastes_little_and_keeps_more_documents_whole(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = np.minimum(np.maximum(2, random.lognormal(6, 1.2, 4000)), 20_000).astype(np.int64)
    packed = pack(lengths, 2048)
    assert packed.count * 2048 - lengths.sum() < 0.005 * lengths.sum()
    whole = lengths <= 2048
    ends = np.cumsum(lengths)
    end_to_end = (ends - 1) // 2048 != (ends - lengths) // 2048
    assert end_to_end[whole].mean() > 0.15, "what concatenation cuts in two"


def test_the_same_command_again(tmp_path: Path) -> None:
    write_source(tmp_path / "plain", shards_of(random_documents(50, 30), 3))
    first = pack_source(tmp_path / "plain", 16, tmp_path / "packed")
    stamp = (tmp_path / "packed" / "shard-00000.bin").stat().st_mtime_ns
    assert pack_source(tmp_path / "plain", 16, tmp_path / "packed") == first
    assert (tmp_path / "packed" / "shard-00000.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="holds another source"):
        pack_source(tmp_path / "plain", 8, tmp_path / "packed")
    with pytest.raises(UserError, match="packed already"):
        pack_source(tmp_path / "packed", 8, tmp_path / "again")


def test_sources_that_cannot_be_packed(tmp_path: Path) -> None:
    from megatron_smol.data.indexed import IndexedWriter

    with IndexedWriter(tmp_path / "web", np.uint16) as writer:
        writer.add_document([1, 2, EOD])
        writer.finalize()
    with pytest.raises(DataError, match="does not say where its documents end"):
        pack_source(tmp_path / "web", 8, tmp_path / "packed")
    write_source(tmp_path / "plain", [[[1, EOD]]])
    with pytest.raises(UserError, match="at least 2 tokens"):
        pack_source(tmp_path / "plain", 1, tmp_path / "packed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "shard-00000.bin").write_bytes(b"of another tool")
    with pytest.raises(UserError, match="holds shards that this command did not make"):
        pack_source(tmp_path / "plain", 4, tmp_path / "other")
    assert (tmp_path / "other" / "shard-00000.bin").read_bytes() == b"of another tool"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# `smol ...`, killed when it would do one thing for the n-th time.
KILLED = """
import os, signal, sys
from megatron_smol import cli
from megatron_smol.data import packing

owner, what, times = packing, sys.argv[1], int(sys.argv[2])
if what == "finalize":
    owner = packing.IndexedWriter
real, calls = getattr(owner, what), []

def dying(*given):
    calls.append(given)
    if len(calls) == times:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)

setattr(owner, what, dying)
del sys.argv[1:3]
cli.entry()
"""


def test_killed_and_started_again_the_bytes_are_the_same(tmp_path: Path) -> None:
    write_source(tmp_path / "plain", shards_of(random_documents(1000, 300), 10))
    pack_source(tmp_path / "plain", 64, tmp_path / "whole")
    killed, work = tmp_path / "killed", tmp_path / "killed" / ".pack"
    command = smol("data", "pack", tmp_path / "plain", "--length", 64, "--output", killed)
    # Before the plan is written; with one shard done and the next one's record missing; with three done (the first and
    # two more), the next one written and not yet in place.
    for what, times, done in (("write_whole", 1, 0), ("write_whole", 3, 1), ("finalize", 3, 3)):
        script = [sys.executable, "-c", KILLED, what, str(times), *command[3:]]
        ended = subprocess.run(script, env=environment(), capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert len(list(work.glob("0*.json"))) == done and not (killed / "manifest.json").exists()
    assert list(killed.glob("shard-00003.bin.*.partial"))
    kept = {number: (killed / f"shard-0000{number}.bin").stat().st_mtime_ns for number in range(3)}
    again = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    for number, written in kept.items():
        assert (killed / f"shard-0000{number}.bin").stat().st_mtime_ns == written, "finished shards are kept"
    assert files_of(killed) == files_of(tmp_path / "whole")
    assert "windows of 64 tokens; 1,000 documents" in again.stdout
