"""The system's file locks, which end with their process however it ends: what locks of folders are made of."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from megatron_smol.errors import DiskError, UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def flock(stream: IO[str], *, shared: bool = False) -> bool:
    """Lock an open file; False while another process holds it.

    UserError where the file system has no locks; DiskError where it may have them again (ENOLCK: its lock server is away).
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        kind = DiskError if error.errno == errno.ENOLCK else UserError
        raise kind(
            f"the file system of {stream.name} has no file locks ({error.strerror}), which keep two processes from "
            "writing over each other: mount it with them (Lustre: -o flock), or choose another place"
        ) from error
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
        except (OSError, UserError):
            stream.close()
            raise
        if is_at(stream, path):
            return stream
        stream.close()  # removed while it was opened: the one that is there now counts
