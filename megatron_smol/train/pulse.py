"""What this rank's main thread is doing, and since when: written by the trainer, read by the watchdog's thread."""

from __future__ import annotations

import time

# In the order in which they follow each other in a step: who is in an earlier one lags.
STARTING, LOADING, COMPUTING, UPDATING, REPORTING, VALIDATING, SAVING, AGREEING = PHASES = (
    "starting or loading a checkpoint",
    "loading data",
    "forward and backward",
    "optimizer",
    "reporting",
    "validation",
    "saving",
    "agreeing to go on",
)
# What may take much longer than a step.
PAUSES = (STARTING, VALIDATING, SAVING)


class Pulse:
    """(stage index, step, phase) of the main thread. A few attributes without a lock: one thread writes them."""

    def __init__(self) -> None:
        self.stage_index, self.step, self.phase = 0, 0, STARTING
        self.since = time.monotonic()

    def mark(self, phase: str) -> float:
        """A phase begins: the seconds that the one before took."""
        now = time.monotonic()
        took, self.since, self.phase = now - self.since, now, phase
        return took
