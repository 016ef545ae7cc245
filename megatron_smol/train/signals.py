"""SIGTERM, SIGUSR1 and the files RUN/stop and RUN/save become a flag that all ranks read at the same step.

Slurm sends a signal before the time limit or a preemption; `scancel` and Ctrl-C end up here too. A second
signal changes nothing (a fourth Ctrl-C ends the process): the save under way is what saves the work. Signals
are held back by `hold` and taken by `install` before torch is imported (seconds in which a signal would
otherwise kill the rank), so this file imports nothing heavy at its top.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
STOP_FILE = "stop"
SAVE_FILE = "save"
# In place of a signal's number, larger than any of them.
ASKED_BY_FILE = 1000
# The run folder is on a shared file system: one look a second, by one rank.
LOOK_EVERY_SECONDS = 1.0


def hold() -> None:
    """Let the stop signals wait: what arrives from here on is delivered by `StopFlag.install`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def ignore() -> None:
    """The stop signals change nothing any more, whichever thread they reach: what there was to save is saved.

    For a process that leaves. Python then takes handlers down and the system's default would kill it, with another
    exit code; `hold` speaks for one thread only, and those of a process group outlive it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def follow_launcher() -> None:
    """A rank of torchrun is killed when torchrun is: it would train on without it, or wait for others that do not come,
    while the next start finds the run taken. (srun's ranks are ended by Slurm.)"""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class StopFlag:
    """Set by a signal on any rank, or by the file `folder`/stop; `agreed` tells every rank alike.

    folder: the run's; without one, what the launcher names in SMOL_RUN_FOLDER, if anything. save_asked: whether the
    last `agreed` found the file `folder`/save, which asks for one checkpoint and is removed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.received: int = 0
        self.save_asked = False
        self._count = 0
        named = os.environ.get("SMOL_RUN_FOLDER")
        self._folder = folder or (Path(named) if named else None)
        self._looked = 0.0

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.received = number
        if number == signal.SIGINT and self._count >= 3:  # a person insists: end now
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any rank received, or ASKED_BY_FILE (0: none), the same on all ranks. Called once a step."""
        import torch

        from megatron_smol.model.backend import backend

        save = self._look() if torch.distributed.get_rank() == 0 else False
        flags = torch.tensor([self.received, save], device=backend().device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        stop, self.save_asked = int(flags[0]), bool(flags[1])
        return stop

    def _look(self) -> bool:
        """See what files ask for, once a second; whether one asks to save."""
        now = time.monotonic()
        if self._folder is None or now - self._looked < LOOK_EVERY_SECONDS:
            return False
        self._looked = now
        if (self._folder / STOP_FILE).exists():
            self.received = ASKED_BY_FILE
        save = self._folder / SAVE_FILE
        asked = save.exists()
        if asked:
            save.unlink(missing_ok=True)
        return asked
