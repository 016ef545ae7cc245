"""Who trains in a run folder, or in the output of SFT and DPO: one job, whatever else was started or was taken for dead.

The lock is the system's (flock), so that it does not outlive its process; the file's text says whose it is.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megatron_smol.errors import InUseError, UserError

LOCK = ".lock"
# What an earlier leg left on a node that was frozen or cut off lives until Slurm reaches the node, and then KillWait
# (30 s by default) longer.
WAIT_SECONDS = 120.0


def take_lock(run: Path, say: Callable[[str], None]) -> IO[str]:
    """Held as long as the file is open.

    Another job's folder is refused at once (UserError). One that a leg of this very job still holds is waited for, at most
    LOCK_SECONDS, then it is an InUseError, with which a job starts again: nobody has to mend anything.
    """
    lock = (run / LOCK).open("a+")
    seconds, told = float(os.environ.get("LOCK_SECONDS", WAIT_SECONDS)), False
    until = time.monotonic() + seconds
    while not _taken(lock):
        lock.seek(0)
        holder = lock.read().strip()
        if not _own(holder):
            raise UserError(
                f"another job is training in {run} ({holder}); wait for it, or choose another folder"
            )
        if time.monotonic() > until:
            raise InUseError(f"an earlier leg of this job still holds {run} ({holder}) after {seconds:.0f} s")
        if not told:
            say(
                f"{run} is still held by an earlier leg of this job ({holder}): waits, at most {seconds:.0f} s"
            )
            told = True
        time.sleep(0.5)
    lock.truncate(0)
    lock.write(f"{_job()}process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _job() -> str:
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    return "" if not job else f"job {job} of array {array}, " if array else f"job {job}, "


def _own(holder: str) -> bool:
    """Whether it is of this job, or of this array, whose elements come one after the other."""
    found = re.match(r"job (\d+)(?: of array (\d+))?, ", holder)
    if not found or "SLURM_JOB_ID" not in os.environ:
        return False
    return os.environ["SLURM_JOB_ID"] == found[1] or os.environ.get("SLURM_ARRAY_JOB_ID", "") == found[2]
