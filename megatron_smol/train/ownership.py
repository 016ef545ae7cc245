"""A rank that was frozen and runs again must not write into a run that a later start of its job has taken over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_smol.recipe.plan import StagePlan
from megatron_smol.train.hooks import Hook, StepDone
from megatron_smol.train.lock import Claim

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer


class Ownership(Hook):
    """Rank 0, which writes the run's files, looks at its lock before it does. (Its unfinished saves are gone: the later start
    removed them.)"""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim

    def _require(self) -> None:
        if torch.distributed.get_rank() == 0:
            self._claim.require()

    def on_run_start(self, trainer: Trainer) -> None:
        self._require()

    def on_stage_start(self, trainer: Trainer, stage: StagePlan) -> None:
        self._require()

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        self._require()

    def on_stage_end(self, trainer: Trainer, stage: StagePlan) -> None:
        self._require()

    def before_save(self, trainer: Trainer) -> None:
        self._require()

    def on_saved(self, trainer: Trainer, path: str) -> None:
        self._require()
