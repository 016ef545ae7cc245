"""What may happen around training steps, and is not training: metrics, validation, reports.

The trainer knows no hook by name. A hook overrides what it needs, and what it remembers goes through
`state_dict` into every checkpoint, so that a resumed run does not differ from an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smol.data.stream import Rows
from megatron_smol.recipe.plan import StagePlan
from megatron_smol.train.step import StepResult

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer


@dataclass(frozen=True)
class StepDone:
    """What is known after a step: `step` completed lineage steps, its learning rate, loss, rows and time.

    own_seconds: waiting for data, and this rank's own work. scalars: what hooks add for those after them to show.
    """

    stage: StagePlan
    step: int
    lr: float
    result: StepResult
    rows: Rows
    seconds: float
    own_seconds: float = 0.0
    scalars: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.stage.tokens_at(self.step)

    @property
    def tokens_per_second(self) -> float:
        return self.stage.tokens_per_step / self.seconds


class RollBack(Exception):
    """Raised by a hook on all ranks alike: train on from this checkpoint instead."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


class Hook:
    """Base of all hooks: every method may be left as it is. All ranks call all of them in the same order."""

    def on_run_start(self, trainer: Trainer) -> None:
        """The state is loaded (or fresh) and training goes on from it: at the start, and after each roll-back."""

    def on_stage_start(self, trainer: Trainer, stage: StagePlan) -> None:
        """A stage begins at its first step; not called when a run resumes inside a stage."""

    def wants(self, trainer: Trainer, stage: StagePlan) -> bool:
        """Whether the batch of the next step (state.step + 1) is to be trained on; if any hook says no it is skipped."""
        return True

    def admits(self, trainer: Trainer, stage: StagePlan, result: StepResult) -> bool:
        """Whether the next step's gradients, now known, may change the weights; raises RollBack to go back."""
        return True

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        """A step is complete."""

    def on_stage_end(self, trainer: Trainer, stage: StagePlan) -> None:
        """The last step of a stage is complete; its checkpoint is written after this."""

    def before_save(self, trainer: Trainer) -> None:
        """A checkpoint of this moment is taken after this: what a run needs to go on from it must be on the disk."""

    def on_saved(self, trainer: Trainer, path: str) -> None:
        """A checkpoint was published."""

    def on_run_end(self, trainer: Trainer, finished: bool) -> None:
        """The run is over, or (not `finished`) it saved itself and stops here."""

    def state_dict(self) -> dict[str, Any]:
        """What this hook must remember, as plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
