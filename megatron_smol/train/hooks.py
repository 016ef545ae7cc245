"""What may happen around training steps, and is not training: metrics, validation, reports.

The trainer knows no hook by name. A hook overrides what it needs, and what it remembers goes through
`state_dict` into every checkpoint, so that a resumed run does not differ from an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_smol.data.stream import Rows
from megatron_smol.recipe.plan import StagePlan
from megatron_smol.train.step import StepResult

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer


@dataclass(frozen=True)
class StepDone:
    """What is known after a step: `step` completed lineage steps, its learning rate, loss, rows and time."""

    stage: StagePlan
    step: int
    lr: float
    result: StepResult
    rows: Rows
    seconds: float

    @property
    def tokens(self) -> int:
        return self.stage.tokens_at(self.step)

    @property
    def tokens_per_second(self) -> float:
        return self.stage.tokens_per_step / self.seconds


class Hook:
    """Base of all hooks: every method may be left as it is. All ranks call all of them in the same order."""

    def on_run_start(self, trainer: Trainer) -> None:
        """The state is loaded (or fresh), nothing was trained in this leg yet."""

    def on_stage_start(self, trainer: Trainer, stage: StagePlan) -> None:
        """A stage begins at its first step; not called when a run resumes inside a stage."""

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        """A step is complete."""

    def on_stage_end(self, trainer: Trainer, stage: StagePlan) -> None:
        """The last step of a stage is complete; its checkpoint is written after this."""

    def on_saved(self, trainer: Trainer, path: str) -> None:
        """A checkpoint was published."""

    def on_run_end(self, trainer: Trainer, finished: bool) -> None:
        """The run is over, or (not `finished`) it saved itself and stops here."""

    def state_dict(self) -> dict[str, Any]:
        """What this hook must remember, as plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
