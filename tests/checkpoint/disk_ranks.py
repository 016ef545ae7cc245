"""What ranks do in the tests of disks that fail: save step 2, break something, try to save step 4, mend it, save step 4.

Run by helpers.run_ranks. Two tensor-parallel ranks, so that each writes a file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_smol.checkpoint import durable, folder, store
from megatron_smol.checkpoint.staging import Staging
from megatron_smol.errors import CheckpointError
from tests import ranks
from tests.layouts import Layout

LAYOUT = Layout(2, {"tp": 2})
_CLONE_NEWNS = 0x20000


def each(where: str, cases: list[str]) -> list[tuple[str, float, list[str]]]:
    """For each case, on this rank: (what was raised, after how many seconds, what is in the folder then)."""
    running = ranks.engine(LAYOUT)
    return [_try(running, Path(where) / str(number), case) for number, case in enumerate(cases)]


def _try(running: Any, where: Path, case: str) -> tuple[str, float, list[str]]:
    staging, said = Staging(), ""
    save(running, where, 2, staging)
    began = time.monotonic()
    with CASES[case](where):
        try:
            save(running, where, 4, staging)
        except CheckpointError as error:
            said = str(error)
        seconds = time.monotonic() - began
        torch.distributed.barrier()  # rank 0 clears up
    left = sorted(path.name for path in where.glob("*-*"))
    torch.distributed.barrier()
    save(running, where, 4, staging)
    for one in folder.list_checkpoints(where):
        folder.verify_files(one.path)
    return said, seconds, left


def save(running: Any, where: Path, step: int, staging: Staging, parameters: int | None = None) -> None:
    """As a run does it: begun, trained beside, finished."""
    path = where / folder.checkpoint_name("one", step)
    state = {"stage": "one", "stage_index": 0, "step": step}
    count = parameters if parameters is not None else 10_000
    under_way = store.begin_save(running, path, state, 16 * count, staging)
    ranks.train(running, LAYOUT, step, step + 1)
    under_way.finish()


# --- on rank 1 only ----------------------------------------------------------------------------------------


def _is_hit() -> bool:
    return torch.distributed.get_rank() == 1


@contextmanager
def _failing_write(where: Path, number: int, after_bytes: int) -> Iterator[None]:
    """Rank 1's files of tensors fail once so many bytes are written; the write before that is a short one, as a full
    disk's is."""
    real, block, left = os.pwrite, durable._BLOCK_BYTES, after_bytes

    def failing(descriptor: int, data: Any, at: int) -> int:
        nonlocal left
        fits = min(len(data), left - left % 4096)
        if not fits:
            raise OSError(number, os.strerror(number))
        left -= fits
        return real(descriptor, data[:fits], at)

    if _is_hit():
        os.pwrite, durable._BLOCK_BYTES = failing, 16_384
    try:
        yield
    finally:
        os.pwrite, durable._BLOCK_BYTES = real, block


@contextmanager
def _fsync(where: Path, what: Callable[[], None]) -> Iterator[None]:
    real = os.fsync

    def failing(descriptor: int) -> None:
        what()
        real(descriptor)

    if _is_hit():
        os.fsync = failing  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real


def _eio() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextmanager
def _size_limit(where: Path) -> Iterator[None]:
    """A real one: the system refuses the write that goes beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if _is_hit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _mounted(where: Path, *options: str) -> Iterator[None]:
    """Rank 1 sees the folder through a mount of its own (its threads do, too)."""
    if _is_hit():
        assert ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", *options, str(where)], check=True)
    try:
        yield
    finally:
        if _is_hit():
            subprocess.run(["umount", str(where)], check=True)


@contextmanager
def _read_only(where: Path) -> Iterator[None]:
    with _mounted(where, "--bind", str(where)):
        if _is_hit():
            subprocess.run(["mount", "-o", "remount,bind,ro", str(where)], check=True)
        yield


CASES: dict[str, Callable[[Path], Any]] = {
    "EIO in a write": lambda where: _failing_write(where, errno.EIO, 0),
    "ENOSPC late": lambda where: _failing_write(where, errno.ENOSPC, 200_000),
    "EIO in fsync": lambda where: _fsync(where, _eio),
    "size limit": _size_limit,
    "slow": lambda where: _fsync(where, lambda: time.sleep(1)),
    "read-only": _read_only,
    "another disk in its place": lambda where: _mounted(where, "-t", "tmpfs", "tmpfs"),
}


# --- a real disk that is full ------------------------------------------------------------------------------


def on_a_full_disk(where: str, parts: list[float], inodes: int) -> list[tuple[str, str, list[str]]]:
    """`where` is a small file system. For each part of a checkpoint that has room: what is raised when it is predicted,
    and when it is not; what is there then. Last of all: no room for files."""
    running, here, staging, found = ranks.engine(LAYOUT), Path(where), Staging(), []
    save(running, here, 2, staging)
    size = sum(file.stat().st_size for file in (here / "one-00000002").iterdir())
    torch.distributed.barrier()
    for part in parts:
        with _ballast(here, int(part * size)):
            predicted = _fails(running, here, staging, size // 16)
            late = _fails(running, here, staging, 1)
        found.append((predicted, late, sorted(path.name for path in here.glob("*-*"))))
        torch.distributed.barrier()
    with _files(here, leave=inodes):
        predicted = _fails(running, here, staging, 1)
    found.append((predicted, "", sorted(path.name for path in here.glob("*-*"))))
    torch.distributed.barrier()
    save(running, here, 4, staging)
    for one in folder.list_checkpoints(here):
        folder.verify_files(one.path)
    return found


def _fails(running: Any, here: Path, staging: Staging, parameters: int) -> str:
    try:
        save(running, here, 4, staging, parameters)
    except CheckpointError as error:
        torch.distributed.barrier()
        return str(error)
    return ""


@contextmanager
def _ballast(here: Path, leave_bytes: int) -> Iterator[None]:
    ballast, is_mine = here / "ballast", torch.distributed.get_rank() == 0
    if is_mine:
        system = os.statvfs(here)
        ballast.write_bytes(bytes(system.f_bavail * system.f_frsize - leave_bytes))
    torch.distributed.barrier()
    yield
    torch.distributed.barrier()
    if is_mine:
        ballast.unlink()


@contextmanager
def _files(here: Path, leave: int) -> Iterator[None]:
    files, is_mine = here / "files", torch.distributed.get_rank() == 0
    if is_mine:
        files.mkdir()
        for number in range(os.statvfs(here).f_favail - leave):
            (files / str(number)).touch()
    torch.distributed.barrier()
    yield
    torch.distributed.barrier()
    if is_mine:
        for file in files.iterdir():
            file.unlink()
        files.rmdir()
