"""`smol sft`: supervised fine-tuning of an exported model on conversations, by TRL's SFTTrainer.

SmolLM2's way (huggingface/alignment-handbook, recipes/smollm2): conversations joined to full sequences without
masks between them, loss on all tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_smol.post.tail import Request, load_model, run_tail
from megatron_smol.recipe.schema import Sft


def sft(request: Request) -> int:
    """Fine-tune and write the output folder; returns the exit code."""
    return run_tail(request, make_trainer)


def make_trainer(
    model: Path,
    section: Sft,
    settings: dict[str, Any],
    tokenizer: Any,
    training: Any,
    heldout: Any | None,
    callbacks: list[Any],
) -> Any:
    """TRL's trainer over rows of {"input_ids", "labels"}."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        **settings,
        max_length=section.seq_length,
        packing=section.packing,
        packing_strategy="wrapped",  # joined and cut, as in 2024; the newer kinds need FlashAttention
    )
    trainer = SFTTrainer(
        model=load_model(model, tokenizer),
        args=config,
        train_dataset=training,
        eval_dataset=heldout,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
