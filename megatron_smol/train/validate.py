"""Validation loss of every source, before and after each stage: what a change of mixture did.

Reads the held-out end of each source (data.holdout_tokens), which no stage trains on. Where a stage goes on
from the one before with the same length and RoPE base, its "before" is that stage's "after", not computed twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megatron_smol.data.loader import held_out
from megatron_smol.model.backend import backend
from megatron_smol.recipe.plan import StagePlan
from megatron_smol.train.hooks import Hook
from megatron_smol.train.monitor import JsonLines

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer


class SourceValidation(Hook):
    """Writes validation.jsonl: {"stage", "step", "tokens", "when", "losses": {source: nats per token}}."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def on_run_start(self, trainer: Trainer) -> None:
        self._file = JsonLines(trainer.plan.recipe.run_path / "validation.jsonl", trainer.state.progress)

    def on_stage_start(self, trainer: Trainer, stage: StagePlan) -> None:
        same = (stage.parent, stage.seq_length, stage.rope_base, stage.precision)
        known = (
            self._last.get("losses") if self._last.get("key") == list(same) and not stage.is_branch else None
        )
        self._record(trainer, stage, "start", known)

    def on_stage_end(self, trainer: Trainer, stage: StagePlan) -> None:
        losses = self._record(trainer, stage, "end", None)
        key = [stage.name, stage.seq_length, stage.rope_base, stage.precision]
        self._last = {"key": key, "losses": losses}

    def before_save(self, trainer: Trainer) -> None:
        self._file.flush_to_disk()

    def state_dict(self) -> dict[str, Any]:
        return self._last

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = state

    def _record(
        self, trainer: Trainer, stage: StagePlan, when: str, known: dict[str, float] | None
    ) -> dict[str, float]:
        losses = known if known is not None else source_losses(trainer, stage)
        if losses and torch.distributed.get_rank() == 0:
            step = trainer.state.step
            row = {
                "stage": stage.name,
                "stage_index": stage.index,
                "step": step,
                "tokens": stage.tokens_at(step),
            }
            self._file.write(row | {"when": when, "losses": losses})
            report = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            trainer.say(f"{stage.name}: validation at the {when}: {report}")
        return losses


def source_losses(trainer: Trainer, stage: StagePlan) -> dict[str, float]:
    """Nats per token on the held-out end of each source, at the stage's length; {} when nothing is held out."""
    recipe = trainer.plan.recipe
    losses = {}
    for name, source in trainer.sources.items():
        windows = min(recipe.eval.windows_per_source, (recipe.data.holdout_tokens - 1) // stage.seq_length)
        if windows <= 0:
            continue
        mask_eod = source.eod_id if stage.document_mask else None
        batches = held_out(
            source,
            recipe.data.holdout_tokens,
            stage.seq_length,
            windows,
            trainer.share,
            backend().device,
            mask_eod,
        )
        losses[name] = trainer.engine.evaluate(batches)
    return losses
