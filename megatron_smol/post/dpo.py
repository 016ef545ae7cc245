"""`smol dpo`: direct preference optimisation of a chat model, by TRL's DPOTrainer (arXiv:2305.18290).

The reference is the model as it comes in, loaded on its own: TRL without an explicit one loads whatever the
policy's name points to, which need not be the weights that it starts from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_smol.post.tail import Request, load_model, run_tail
from megatron_smol.recipe.schema import Dpo


def dpo(request: Request) -> int:
    """Optimise and write the output folder; returns the exit code."""
    return run_tail(request, make_trainer)


def make_trainer(
    model: Path,
    section: Dpo,
    settings: dict[str, Any],
    tokenizer: Any,
    training: Any,
    heldout: Any | None,
    callbacks: list[Any],
) -> Any:
    """TRL's trainer over rows of {"prompt_ids", "chosen_ids", "rejected_ids"}, lengths already cut."""
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):
        """TRL tokenizes with one limit for all; here prompt and answers have their own, prepare.py's."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    config = DPOConfig(**settings, beta=section.beta, loss_type=[section.loss], max_length=None)
    trainer = TokenizedDPOTrainer(
        model=load_model(model, tokenizer),
        ref_model=load_model(model, tokenizer),
        args=config,
        train_dataset=training,
        eval_dataset=heldout,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
