"""Sources behind addresses: read by ranges, cached whole, bounded, safe with several ranks and after a kill."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smol.data.cache import FileCache
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.data.stores import FileFacts, RemoteStore
from megatron_smol.errors import DataError, UserError
from tests.data.test_source import write_source

SHARD_TOKENS = 5001  # the end-of-document id included
SHARD_BYTES = 2 * SHARD_TOKENS


class Server:
    """A web server for one folder that counts what is asked of it. `ranges`: does it know byte ranges?"""

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.asked: Counter[str] = Counter()
        self.stalled = threading.Event()
        self.stall_at: str | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            wbufsize = 1 << 20  # head and body in one packet

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                path = folder / self.path.rsplit("/", 1)[-1]
                if not path.is_file():
                    self.send_error(404)
                    return
                whole = data = path.read_bytes()
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if ranges else None
                if span is not None:
                    data = whole[int(span[1]) : int(span[2]) + 1]
                    if not data:
                        self.send_error(416)
                        return
                if body:
                    outer.asked[f"{'all' if data == whole else 'part'} of {path.name}"] += 1
                self.send_response(200 if span is None else 206)
                self.send_header("Content-Length", str(len(data)))
                if span is not None:
                    self.send_header("Content-Range", f"bytes {span[1]}-{len(whole) - 1}/{len(whole)}")
                if ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if body and path.name == outer.stall_at and data == whole:
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    outer.stalled.set()
                    time.sleep(30)
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SMOL_CACHE_GB", "1")
    return tmp_path / "cache"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(folder: Path, ranges: bool = True) -> Server:
        servers.append(Server(folder, ranges))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def make(folder: Path, shards: int = 3, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return write_source(
        folder, [[[*random.integers(4, 9000, SHARD_TOKENS - 1).tolist(), 3]] for _ in range(shards)]
    )


def read_all_over(source: TokenSource, tokens: np.ndarray) -> None:
    rows = np.zeros((40, 257), np.uint16)
    starts = np.random.default_rng(1).integers(0, len(tokens) - 257, 40).tolist()
    source.read_windows(starts, list(rows))
    for start, row in zip(starts, rows, strict=True):
        np.testing.assert_array_equal(row, tokens[start : start + 257])


def fetched(source: TokenSource) -> None:
    assert isinstance(source.store, RemoteStore)
    source.store.wait()


def shards_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/shard-*.bin"))


@pytest.mark.parametrize("where", ["file", "http", "http-without-ranges", "memory"])
def test_windows_come_at_once_and_shards_are_cached_behind_them(
    where: str, tmp_path: Path, cache: Path, serve: Callable[..., Server]
) -> None:
    tokens = make(tmp_path / "web")
    if where == "memory":
        import fsspec

        fsspec.filesystem("memory").put(f"{tmp_path}/web/", "/web/", recursive=True)
        url = "memory://web"
    elif where == "file":
        url = f"file://{tmp_path}/web"
    else:
        url = serve(tmp_path / "web", where == "http").url
    source = load_source(url)
    assert (source.tokens, source.documents, source.eod_id) == (len(tokens), 3, 3)
    assert source.identity == load_source(tmp_path / "web").identity
    read_all_over(source, tokens)
    fetched(source)
    assert [path.read_bytes() for path in shards_in(cache)] == [
        path.read_bytes() for path in sorted((tmp_path / "web").glob("*.bin"))
    ]
    for path in (tmp_path / "web").glob("*.bin"):
        path.unlink()  # from here on, only the cache has them
    if where != "memory":
        read_all_over(source, tokens)
    assert source.shards[1].document(0)[:9].tolist() == tokens[SHARD_TOKENS : SHARD_TOKENS + 9].tolist()


def test_the_cache_is_bounded_and_the_rest_is_read_by_ranges(
    tmp_path: Path, cache: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOL_CACHE_GB", str(2.5 * SHARD_BYTES / 1e9))
    tokens, server = make(tmp_path / "web", shards=5), serve(tmp_path / "web")
    source = load_source(server.url)
    for _ in range(3):
        read_all_over(source, tokens)
        fetched(source)
    assert len(shards_in(cache)) == 2, "the manifest takes a little of the room"
    assert sum(file.stat().st_size for file in cache.glob("*/*")) <= 2.5 * SHARD_BYTES
    whole = [name for name in server.asked if name.startswith("all of shard")]
    assert len(whole) == 2 and all(server.asked[name] == 1 for name in whole), server.asked
    monkeypatch.setenv("SMOL_CACHE_GB", "0")
    with pytest.raises(DataError, match="raise SMOL_CACHE_GB"):
        load_source(f"{server.url}").shards[4]


def test_shards_of_a_finished_run_make_room_and_those_in_use_do_not(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOL_CACHE_GB", str(3.5 * SHARD_BYTES / 1e9))
    old, new = make(tmp_path / "old", 3, seed=1), make(tmp_path / "new", 3, seed=2)
    first = load_source(f"file://{tmp_path}/old")
    read_all_over(first, old)
    fetched(first)
    second = load_source(f"file://{tmp_path}/new")
    read_all_over(second, new)
    fetched(second)
    assert [path.parent.name[:4] for path in shards_in(cache)] == ["old-"] * 3, (
        "the old source is still in use"
    )
    del first
    second = load_source(f"file://{tmp_path}/new")
    read_all_over(second, new)
    fetched(second)
    assert {path.parent.name[:4] for path in shards_in(cache)} == {"new-"}
    read_all_over(second, new)


def test_a_shard_that_changed_on_the_store_stops_the_run_and_is_not_kept(tmp_path: Path, cache: Path) -> None:
    make(tmp_path / "web")
    damaged = tmp_path / "web" / "shard-00001.bin"
    damaged.write_bytes(b"\x09" + damaged.read_bytes()[1:])
    source = load_source(f"file://{tmp_path}/web")
    source.read(0, source.tokens)
    fetched(source)
    with pytest.raises(DataError, match=r"file://.*shard-00001\.bin changed since it was written"):
        source.read(0, 5)
    assert [path.name for path in shards_in(cache)] == ["shard-00000.bin", "shard-00002.bin"]
    assert not list(cache.glob("*/*.partial"))


def test_missing_and_truncated_files_on_the_store_are_named(
    tmp_path: Path, cache: Path, serve: Callable[..., Server]
) -> None:
    tokens, server = make(tmp_path / "web"), serve(tmp_path / "web")
    source = load_source(server.url)
    os.truncate(tmp_path / "web" / "shard-00002.bin", SHARD_BYTES - 100)
    with pytest.raises(DataError, match=r"http://.*shard-00002\.bin gave .* shorter than its manifest says"):
        source.read(len(tokens) - 100, 100)
    (tmp_path / "web" / "shard-00001.bin").unlink()
    with pytest.raises(DataError, match=r"missing shard file http://.*shard-00001\.bin"):
        source.read(SHARD_TOKENS, 100)
    with pytest.raises(DataError, match=r"missing shard file file://.*shard-00001\.bin"):
        load_source(f"file://{tmp_path}/web")
    with pytest.raises(DataError, match=r"no tokens at .*nowhere: expected manifest\.json"):
        load_source(f"file://{tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("url", "says"), [("s4://bucket/web", "no address that fsspec knows"), ("gs://bucket/web", "gcsfs")]
)
def test_addresses_that_cannot_be_opened(url: str, says: str, cache: Path) -> None:
    with pytest.raises(UserError, match=says):
        load_source(url)


def test_a_senseless_cache_size(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "web")
    monkeypatch.setenv("SMOL_CACHE_GB", "much")
    with pytest.raises(UserError, match="SMOL_CACHE_GB is 'much'"):
        load_source(f"file://{tmp_path}/web")


RANK = """
import hashlib, os, pathlib, sys, time
from megatron_smol.data.source import load_source
source = load_source(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
for shard in range(len(source.shards)):
    source.read(shard * 5001, 100)
source.store.wait()
while len(list(pathlib.Path(os.environ["SMOL_CACHE"]).glob("*/*.bin"))) < len(source.shards):
    time.sleep(0.01)  # another rank is at it
print(hashlib.sha256(source.read(0, source.tokens).tobytes()).hexdigest())
"""


def start_rank(url: str) -> subprocess.Popen[str]:
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None and rank.stdout.readline() == "open\n"
    return rank


def test_ranks_of_a_node_fetch_each_shard_once(
    tmp_path: Path, cache: Path, serve: Callable[..., Server]
) -> None:
    tokens, server = make(tmp_path / "web", shards=6), serve(tmp_path / "web")
    ranks = [start_rank(server.url) for _ in range(3)]
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("go\n")
        rank.stdin.flush()
    expected = hashlib.sha256(tokens.astype(np.uint16).tobytes()).hexdigest()
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == [expected + "\n"] * 3
    assert len(shards_in(cache)) == 6 and not list(cache.glob("*/*.partial"))
    whole = {name: count for name, count in server.asked.items() if name.startswith("all of shard")}
    assert set(whole.values()) == {1} and len(whole) == 6, whole


def test_what_another_rank_is_fetching_counts(tmp_path: Path) -> None:
    """Two ranks, each with a file that fits alone: the second must see the first one's room as taken."""
    mine, other = (FileCache(tmp_path, limit_bytes=15) for _ in range(2))
    folder = mine.folder_of("s3://bucket/web", b"a manifest")
    found = []

    def blocks() -> Iterator[bytes]:
        yield b"12345"
        second = FileFacts("shard-00001.bin", 10)
        found.append(other.fetch(folder, second, "s3://bucket/web/shard-00001.bin", [b"0123456789"]))
        yield b"67890"

    path = mine.fetch(folder, FileFacts("shard-00000.bin", 10), "s3://bucket/web/shard-00000.bin", blocks())
    assert found == [None]
    assert path is not None and path.read_bytes() == b"1234567890"
    assert [file.name for file in folder.iterdir() if not file.name.startswith(".")] == ["shard-00000.bin"]


def test_what_is_being_written_is_not_taken_for_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank opens the source while another looks for what killed ones left behind."""
    mine, other = (FileCache(tmp_path, limit_bytes=1000) for _ in range(2))
    folder = mine.folder_of("s3://bucket/web", b"a manifest")

    def publish_late(partial: Path, path: Path) -> None:
        other.fetch(folder, FileFacts("shard-00000.bin", 3), "s3://bucket/web/shard-00000.bin", [b"123"])
        partial.replace(path)

    monkeypatch.setattr("megatron_smol.data.files.publish", publish_late)
    assert mine.keep(folder, "manifest.json", b"{}").read_bytes() == b"{}"
    assert (folder / "shard-00000.bin").read_bytes() == b"123"


def test_a_kill_while_fetching_leaves_no_half_shard(
    tmp_path: Path, cache: Path, serve: Callable[..., Server]
) -> None:
    tokens, server = make(tmp_path / "web", shards=1), serve(tmp_path / "web")
    server.stall_at = "shard-00000.bin"
    rank = start_rank(server.url)
    assert rank.stdin is not None
    rank.stdin.write("go\n")
    rank.stdin.flush()
    assert server.stalled.wait(60)
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    assert [path.name for path in cache.glob("*/*.partial")], "the kill came in the middle"
    server.stall_at = None
    source = load_source(server.url)
    source.read(0, source.tokens)
    fetched(source)
    read_all_over(source, tokens)
    assert len(shards_in(cache)) == 1 and not list(cache.glob("*/*.partial"))
