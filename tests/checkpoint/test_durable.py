"""A file that is hashed and flushed while it is written: any sizes, any disk, and no error lost."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megatron_smol.checkpoint import durable
from megatron_smol.checkpoint.durable import DurableFile
from megatron_smol.checkpoint.folder import CHECKSUM

BLOCK = 3 * 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_BLOCK_BYTES", BLOCK)


def write(path: Path, content: bytes, seed: int = 0) -> DurableFile:
    """In pieces of any size: none, a byte, several blocks."""
    pieces, done = random.Random(seed), 0
    with DurableFile(path) as file:
        while done < len(content):
            done += file.write(content[done : done + pieces.choice([0, 1, 100, BLOCK, 4 * BLOCK + 1])])
            assert file.tell() == done
    return file


@pytest.mark.parametrize(
    "size", [0, 1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1, 40 * BLOCK + 77]
)
def test_the_bytes_and_what_is_said_of_them(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    file = write(tmp_path / "file", content, seed=size)
    assert (tmp_path / "file").read_bytes() == content
    assert file.described == {"bytes": size, CHECKSUM: xxhash.xxh3_128(content).hexdigest()}


@pytest.fixture(params=["at opening", "at the first write"])
def disk_without_direct_io(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses O_DIRECT, as some file systems do at once and others when they see how a write is aligned."""
    open_, pwrite = os.open, os.pwrite

    def refuse_to_open(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return open_(path, flags, mode)

    def refuse_to_write(descriptor: int, data: Any, at: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not with this alignment")
        return pwrite(descriptor, data, at)

    if request.param == "at opening":
        monkeypatch.setattr(os, "open", refuse_to_open)
    else:
        monkeypatch.setattr(os, "pwrite", refuse_to_write)


@pytest.mark.usefixtures("disk_without_direct_io")
def test_a_disk_without_direct_io(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(10 * BLOCK + 5)
    assert write(tmp_path / "file", content).described["bytes"] == len(content)
    assert (tmp_path / "file").read_bytes() == content


def test_what_is_written_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:4096], at))
    content = random.Random(2).randbytes(5 * BLOCK + 5)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


@pytest.fixture
def limit_bytes() -> Iterator[int]:
    """A disk that ends: the kernel itself refuses what goes beyond."""
    limit, before = 6 * BLOCK, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("over", [1, 20 * BLOCK], ids=["in the last block", "long before the end"])
def test_a_full_disk_is_an_error(tmp_path: Path, limit_bytes: int, over: int) -> None:
    with pytest.raises(OSError, match="File too large"):
        write(tmp_path / "file", bytes(limit_bytes + over))


def test_it_is_flushed_before_it_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    write(tmp_path / "file", bytes(BLOCK + 5))
    assert sizes == [BLOCK + 5]


def test_an_error_of_the_caller_leaves_nothing_running(tmp_path: Path) -> None:
    files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KeyError), DurableFile(tmp_path / "file") as file:
        file.write(bytes(10 * BLOCK))
        raise KeyError
    assert file.closed and len(list(Path("/proc/self/fd").iterdir())) == files
    assert not hasattr(file, "described")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_old_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        DurableFile(tmp_path / "file")
    gc.collect()  # what could not be opened complains of nothing when it is thrown away
    assert (tmp_path / "file").read_bytes() == b"old"
