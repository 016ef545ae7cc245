"""The system's file locks, which end with their process however it ends: what every lock of this package is made of."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


def flock(stream: IO[str], *, shared: bool = False) -> bool:
    """Lock an open file; False while another process holds it. OSError where the file system has no locks."""
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(stream: IO[str], path: Path) -> bool:
    """Whether an open file is the one that others find at `path`, not one that was removed or replaced since."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def locked_file(path: Path, *, shared: bool = False) -> IO[str] | None:
    """Open `path`, made if need be, and lock it; None while another process holds it.

    FileNotFoundError when its folder is not there (any more).
    """
    while True:
        stream = path.open("a+")
        try:
            if not flock(stream, shared=shared):
                stream.close()
                return None
        except OSError:
            stream.close()
            raise
        if is_at(stream, path):
            return stream
        stream.close()  # removed while it was opened: the one that is there now counts
