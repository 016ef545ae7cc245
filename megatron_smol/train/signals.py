"""SIGTERM and SIGUSR1 become a flag that all ranks read at the same step.

Slurm sends one of them before the time limit or a preemption; `scancel` and Ctrl-C end up here too. A second
signal changes nothing (a fourth Ctrl-C ends the process): the save under way is what saves the work. Installed before torch is imported (seconds in
which a signal would otherwise kill the rank), so this file does not import it at its top.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Set by a signal on any rank; `agreed` tells every rank alike."""

    def __init__(self) -> None:
        self.received: int = 0
        self._count = 0

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.received = number
        if number == signal.SIGINT and self._count >= 3:  # a person insists: end now
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any rank received (0: none), the same on all ranks. Called once a step."""
        import torch

        from megatron_smol.model.backend import backend

        flag = torch.tensor([self.received], device=backend().device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)
