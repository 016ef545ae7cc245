"""The restart decision, all of it: what happened to a leg of a run, and so what the job does next.

Pure, so that every row of its table is tested without a cluster. `leg` gathers the evidence and obeys.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum

from megatron_smol.errors import (
    EXIT_RESTART_ME,
    DataError,
    RunError,
    UserError,
)

EXIT_NO_PROGRESS = 70  # several legs in a row reached no new checkpoint: starting again would not help
EXIT_STOPPED = 71  # a person asked for it: RUN/stop, or scancel
FUTILE_LEGS = 3
UNREACHABLE = "the run folder is out of reach"

# A rank that leaves with one of these has said why, and would say it again. CheckpointError is not among them, as a node
# that dies during a save looks like one to the others, nor DiskError, as there may be room again, nor InUseError, as what is
# left of an earlier leg goes; FUTILE_LEGS ends those.
DELIBERATE = {
    UserError.exit_code: "the recipe or the command line",
    DataError.exit_code: "the data",
    RunError.exit_code: "training itself",
}


class Action(StrEnum):
    DONE = "done"
    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True)
class Evidence:
    """What is known when a leg is over.

    code: exit code of srun (the largest of the ranks'). rank_codes: of ranks that left with neither 0 nor 75, first
    come first. finished: the plan's last checkpoint is published. futile_legs: legs of this job in a row, this
    one included, that began at the checkpoint that is still the newest. step: where the last of them stood.
    """

    code: int
    rank_codes: tuple[int, ...] = ()
    finished: bool = False
    stop_file: str = ""
    cancelled: bool = False
    futile_legs: int = 0
    allowed_futile_legs: int = FUTILE_LEGS
    checkpoint: str = "no checkpoint"
    step: str = "no step"


@dataclass(frozen=True)
class Decision:
    """What the job does, the exit code it leaves with, and why, in one sentence for the log's last lines."""

    action: Action
    exit_code: int
    reason: str


def decide(seen: Evidence) -> Decision:
    """The table, first match wins."""
    if seen.finished:
        return Decision(Action.DONE, 0, "all stages are done and the last checkpoint is published")
    if seen.stop_file:
        return Decision(
            Action.STOP,
            EXIT_STOPPED,
            f"{seen.stop_file} asked for a stop; remove it and submit again to go on from {seen.checkpoint}",
        )
    if seen.cancelled:
        return Decision(
            Action.STOP,
            EXIT_STOPPED,
            f"the job was cancelled; submit again to go on from {seen.checkpoint}",
        )
    if said := next((code for code in (*seen.rank_codes, seen.code) if code in DELIBERATE), None):
        return Decision(
            Action.STOP,
            said,
            f"{DELIBERATE[said]} must be mended first (exit code {said}, the error is above); the job does not start "
            f"itself again, submit it to go on from {seen.checkpoint}",
        )
    if seen.futile_legs >= seen.allowed_futile_legs:
        return Decision(
            Action.STOP,
            EXIT_NO_PROGRESS,
            f"{seen.futile_legs} starts in a row from {seen.checkpoint} reached no new one; the last stood at "
            f"{seen.step} when it {ending(seen.code)}; find the cause above, then submit again",
        )
    return Decision(
        Action.RESTART, EXIT_RESTART_ME, f"training {ending(seen.code)}; {seen.checkpoint} goes on"
    )


def decide_without_folder(why: str, starts: int, allowed: int = FUTILE_LEGS) -> Decision:
    """The run folder could not be asked. starts: how many in a row found it so, this one included."""
    if starts >= allowed:
        return Decision(
            Action.STOP, EXIT_NO_PROGRESS, f"{UNREACHABLE} in {starts} starts in a row ({why}); mend that, then submit again"
        )  # fmt: skip
    return Decision(Action.RESTART, EXIT_RESTART_ME, f"{UNREACHABLE} ({why}); the job starts again")


def ending(code: int) -> str:
    """An exit code of srun in words."""
    if code == EXIT_RESTART_ME:
        return "asked for a restart (saved on a signal, or a hang that is told above)"
    if code == 0:
        return "left with code 0 but is not finished (srun may have started nothing)"
    number = code - 128 if code > 128 else -code
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"failed with code {code}"
