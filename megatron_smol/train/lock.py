"""Who trains in a run folder, or in the output of SFT and DPO: one job, whatever else was started or was taken for dead.

The lock is the system's (flock), so that it does not outlive its process; the file's text says whose it is.

A process may outlive its job: frozen, or waiting for a driver that never answers, on a node that Slurm gave up. The job's
next start waits for it, then puts a lock file of its own in the place of the old one. Whose text is there no longer finds
that out before it writes anything (`Claim.require`), and leaves. That works too where nodes do not see each other's flock.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO

from megatron_smol.errors import InUseError, UserError
from megatron_smol.flock import locked_file

LOCK = ".lock"
WAIT_SECONDS = 120.0  # longer than Slurm needs to end what it reaches (KillWait, 30 s by default)


class _Holder(Enum):
    EARLIER_START = auto()  # of this job: Slurm starts one only when the one before is over
    LATER_START = auto()  # of this job: we are what is left of one before
    SAME_ARRAY = auto()  # whose elements may, or may not, come one after the other
    ANOTHER = auto()


@dataclass(frozen=True)
class Claim:
    """That this start of the job trains in the folder, which its lock file then says. Every rank may hold one."""

    folder: Path
    text: str

    def holds(self) -> bool:
        return _read(self.folder) == self.text

    def require(self) -> None:
        """InUseError if another start of the job has taken the folder over."""
        if not self.holds():
            raise InUseError(
                f"{self.folder} was taken over by a later start of this job while this process did not run; it leaves"
            )


@dataclass
class RunLock:
    """Held until it is closed, or the process is gone."""

    claim: Claim
    file: IO[str]

    def require(self) -> None:
        """InUseError if another start of the job has taken the folder over."""
        self.claim.require()

    def close(self) -> None:
        self.file.close()

    def write(self) -> None:
        """Say whose it is, to processes on other nodes too."""
        self.file.truncate(0)
        self.file.write(self.claim.text)
        self.file.flush()
        os.fsync(self.file.fileno())


def take_lock(folder: Path, say: Callable[[str], None]) -> RunLock:
    """The lock of `folder`, which exists (FileNotFoundError when it is removed while we wait).

    Another job's folder is refused at once (UserError). An earlier start of this very job is waited for, LOCK_SECONDS, and then
    loses it. Another element of this array is waited for; then it is an InUseError, with which a job starts again.
    """
    seconds, told, looked_again = float(os.environ.get("LOCK_SECONDS", WAIT_SECONDS)), False, False
    until = time.monotonic() + seconds
    while (lock := _taken(folder)) is None:
        _require_latest(folder)
        text = _read(folder)
        holder = _whose(text)
        if holder is _Holder.ANOTHER:
            if looked_again:
                raise UserError(
                    f"another job is training in {folder} ({text}); wait for it, or choose another folder"
                )
            looked_again = True  # who has just taken it may not have written yet whose it is
        elif not told:
            say(f"{folder} is still held by an earlier leg ({text}): waits, at most {seconds:.0f} s")
            told = True
        elif time.monotonic() > until:
            if holder is _Holder.SAME_ARRAY:
                raise InUseError(f"an earlier leg still holds {folder} ({text}) after {seconds:.0f} s")
            lock = _taken_over(folder)
            say(f"{folder} is taken over: Slurm started this job again, so the leg that holds it is lost")
            break
        time.sleep(0.5)
    return lock


def _taken(folder: Path) -> RunLock | None:
    file = locked_file(folder / LOCK)
    if file is None:
        return None
    _require_latest(folder)
    lock = RunLock(_claim(folder), file)
    lock.write()
    return lock


def _taken_over(folder: Path) -> RunLock:
    """Put a lock of our own in the place of the one that is held."""
    new = folder / f"{LOCK}-{uuid.uuid4().hex[:8]}"
    file = locked_file(new)
    assert file, "nobody else knows its name"
    lock = RunLock(_claim(folder), file)
    lock.write()
    _require_latest(folder)
    new.replace(folder / LOCK)
    return lock


def _require_latest(folder: Path) -> None:
    """InUseError for a start that was frozen before it took the lock, while a later one came."""
    if _whose(text := _read(folder)) is _Holder.LATER_START:
        raise InUseError(f"{folder} belongs to a later start of this job ({text}); this one leaves")


def _read(folder: Path) -> str:
    try:
        return (folder / LOCK).read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""


def _claim(folder: Path) -> Claim:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Claim(folder, f"{_me()}process {os.getpid()} on {socket.gethostname()} since {since}")


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
        start = int(found[3]), int(found[4])
        if start == _start():  # twice in one interactive allocation
            return _Holder.ANOTHER
        return _Holder.EARLIER_START if start < _start() else _Holder.LATER_START
    if found and found[2] and found[2] == os.environ.get("SLURM_ARRAY_JOB_ID"):
        return _Holder.SAME_ARRAY
    return _Holder.ANOTHER
