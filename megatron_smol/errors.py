"""What a user is told when something is wrong: one sentence, and an exit code that scripts can trust.

Raise these for anything a user can cause or mend; `assert` is for our own invariants. The CLI prints
``error: <message>`` to stderr and exits with the class's code.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """A recipe or a command line that cannot be carried out. The message says what, where, and what to do."""

    exit_code = 2
    alike = False  # raised on all ranks alike: one of them is enough to tell it


class DataError(UserError):
    """Token or text files that are missing, damaged, or made for another tokenizer."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged, or of another model."""

    exit_code = 4


class RunError(UserError):
    """Training cannot go on from here, and starting again alone would not help (a loss that is not a number)."""

    exit_code = 5


# EFBIG: a file-size limit (ulimit -f, a FAT disk); for the user it is the same thing as a full disk.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a file system says that is full, or whose server, network or disk is away (ENOLCK: it grants no locks; EROFS: after errors).
AWAY = (
    *NO_ROOM, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOLCK, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN,
    errno.EHOSTDOWN,
)  # fmt: skip


class DiskError(DataError):
    """No room on a disk. Unlike other errors it may be gone when the same thing is tried again, so a job tries."""

    exit_code = 6


def is_away(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, may be gone when the same thing is tried again: a disk's, not a user's."""
    while error is not None:
        if isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in AWAY):
            return True
        error = error.__cause__
    return False


class InUseError(UserError):
    """A run folder that an earlier leg of this job still holds. Gone in a while, so a job tries again."""

    exit_code = 7


# sysexits.h EX_TEMPFAIL: the run saved itself on a signal; the same command continues it.
EXIT_RESTART_ME = 75


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`allowed`'s closest name as a hint for an error message, or all of them when none is close."""
    names = sorted(map(str, allowed))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(names)}"


def ranks_have_met() -> bool:
    """Whether this process is part of a process group; asked without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.distributed.is_initialized())


def leave(code: int) -> NoReturn:
    """Exit with this code and no other.

    Once ranks have met, threads of their process group live on while the interpreter goes down, and sometimes
    abort it with a code of their own (SIGABRT); leaving at once keeps ours.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if ranks_have_met():
        os._exit(code)
    sys.exit(code)
