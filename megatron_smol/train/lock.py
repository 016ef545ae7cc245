"""Who trains in a run folder, or in the output of SFT and DPO: one job, whatever else was started or was taken for dead.

The lock is the system's (flock), so that it does not outlive its process; the file's text says whose it is.

A process may outlive its job: frozen, or waiting for a driver that never answers, on a node that Slurm gave up. The job's
next start waits for it, then puts a lock file of its own in the place of the old one. Who holds the old one finds that
out before it writes anything (`require`), and leaves.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO

from megatron_smol.errors import InUseError, UserError

LOCK = ".lock"
WAIT_SECONDS = 120.0  # longer than Slurm needs to end what it reaches (KillWait, 30 s by default)


class _Holder(Enum):
    EARLIER_START = auto()  # of this job: Slurm starts one only when the one before is over
    SAME_ARRAY = auto()  # whose elements may, or may not, come one after the other
    ANOTHER = auto()


@dataclass
class RunLock:
    """Held until it is closed, or the process is gone."""

    folder: Path
    file: IO[str]

    def require(self) -> None:
        """InUseError if another start of the job has taken the folder over."""
        if not self._in_place():
            raise InUseError(
                f"{self.folder} was taken over by a later start of this job while this process did not run; it leaves"
            )

    def close(self) -> None:
        self.file.close()

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), (self.folder / LOCK).stat())
        except FileNotFoundError:
            return False


def take_lock(folder: Path, say: Callable[[str], None]) -> RunLock:
    """The lock of `folder`, which exists (FileNotFoundError when it is removed while we wait).

    Another job's folder is refused at once (UserError). An earlier start of this very job is waited for, LOCK_SECONDS, and then
    loses it. Another element of this array is waited for; then it is an InUseError, with which a job starts again.
    """
    seconds, told = float(os.environ.get("LOCK_SECONDS", WAIT_SECONDS)), False
    until = time.monotonic() + seconds
    while (lock := _taken(folder)) is None:
        text = _read(folder)
        holder = _whose(text)
        if holder is _Holder.ANOTHER:
            raise UserError(
                f"another job is training in {folder} ({text}); wait for it, or choose another folder"
            )
        if not told:
            say(f"{folder} is still held by an earlier leg ({text}): waits, at most {seconds:.0f} s")
            told = True
        if time.monotonic() > until:
            if holder is _Holder.SAME_ARRAY:
                raise InUseError(f"an earlier leg still holds {folder} ({text}) after {seconds:.0f} s")
            lock = _taken_over(folder)
            say(f"{folder} is taken over: Slurm started this job again, so the leg that holds it is lost")
            break
        time.sleep(0.5)
    lock.file.truncate(0)
    lock.file.write(f"{_me()}process {os.getpid()} on {socket.gethostname()}")
    lock.file.flush()
    return lock


def _taken(folder: Path) -> RunLock | None:
    while True:
        lock = RunLock(folder, (folder / LOCK).open("a+"))
        try:
            fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        if lock._in_place():
            return lock
        lock.close()  # put away while it was opened: the one that is there now counts


def _taken_over(folder: Path) -> RunLock:
    new = folder / f"{LOCK}-{os.getpid()}"
    lock = RunLock(folder, new.open("a+"))
    fcntl.flock(lock.file, fcntl.LOCK_EX)
    new.replace(folder / LOCK)
    return lock


def _read(folder: Path) -> str:
    try:
        return (folder / LOCK).read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""


def _me() -> str:
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if not job:
        return ""
    restart, attempt = _start()
    return f"job {job}{f' of array {array}' if array else ''}, start {restart}.{attempt}, "


def _start() -> tuple[int, int]:
    """Of this job: how often Slurm requeued it, and how often it began anew inside its allocation (slurm/leg.py)."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ.get("SMOL_ATTEMPT", "0"))


def _whose(text: str) -> _Holder:
    found = re.match(r"job (\d+)(?: of array (\d+))?, start (\d+)\.(\d+), ", text)
    if found and found[1] == os.environ.get("SLURM_JOB_ID"):
        earlier = (int(found[3]), int(found[4])) < _start()
        return _Holder.EARLIER_START if earlier else _Holder.ANOTHER
    if found and found[2] and found[2] == os.environ.get("SLURM_ARRAY_JOB_ID"):
        return _Holder.SAME_ARRAY
    return _Holder.ANOTHER
