"""The sections of a recipe's `tail:`, what follows pretraining: settings of `smol sft` and `smol dpo`."""

from __future__ import annotations

from typing import Literal

from megatron_smol.recipe.section import Float, Section, Steps, field


class Sft(Section):
    """Supervised fine-tuning (`smol sft`), by SmolLM2's settings. Some depend on the model's size."""

    dataset: str | None = field(
        "conversations, rows with `messages`: JSONL or parquet, or a hub name as OWNER/NAME:CONFIG:SPLIT; "
        "default: HuggingFaceTB/smoltalk (1.7B), HuggingFaceTB/smol-smoltalk (360M, 135M)",
        None,
    )
    epochs: Float = field("passes over the dataset", 2.0, "epochs", gt=0)
    lr: Float | None = field("peak LR; default: 3e-4 (1.7B), 1e-3 (360M, 135M)", None, gt=0)
    scheduler: Literal["cosine", "linear"] = field("LR after warm-up", "cosine")
    warmup_ratio: Float = field("warm-up as a share of all steps", 0.1, ge=0, lt=1)
    global_batch: int = field("sequences per step, over all ranks", 128, "sequences", gt=0)
    micro_batch: int = field("sequences per forward pass on one rank", 4, "sequences", gt=0)
    seq_length: int | None = field(
        "longest sequence; default: 8192, or the model's own limit when that is shorter", None, "tokens", gt=1
    )
    packing: bool = field("join conversations to full sequences, and cut there, as SmolLM2 did", True)
    loss_on: Literal["all", "assistant"] = field("tokens that carry loss; SmolLM2 used all", "all")
    beta2: Float = field("AdamW's second beta (the first is 0.9, eps 1e-8)", 0.999, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] | None = field(
        "arithmetic of the matrix products and weights of the output; default: bf16 on a GPU, fp32 on a CPU",
        None,
    )
    seed: int = field("seed of shuffling and of the held-out rows", 42, ge=0, lt=2**32)
    heldout_rows: int = field(
        "rows kept from training and evaluated; at most a tenth of the data", 500, "rows", ge=0
    )
    save_every: Steps = field("interval of evaluation and of checkpoints to resume from", 100, "steps", ge=1)


class Dpo(Section):
    """Direct preference optimisation (`smol dpo`), by SmolLM2's settings. Some depend on the model's size."""

    dataset: str | None = field(
        "preferences, rows with `prompt`, `chosen`, `rejected`: JSONL or parquet, or a hub name as "
        "OWNER/NAME:CONFIG:SPLIT; default: HuggingFaceH4/ultrafeedback_binarized",
        None,
    )
    epochs: Float | None = field(
        "passes over the dataset; default: 3 (1.7B), 2 (360M, 135M)", None, "epochs", gt=0
    )
    lr: Float = field("peak LR", 1e-6, gt=0)
    beta: Float = field("strength of the pull towards the reference model", 0.5, gt=0)
    loss: Literal["sigmoid"] = field("DPO loss", "sigmoid")
    scheduler: Literal["cosine", "linear"] = field("LR after warm-up", "cosine")
    warmup_ratio: Float = field("warm-up as a share of all steps", 0.1, ge=0, lt=1)
    global_batch: int = field("pairs per step, over all ranks", 128, "pairs", gt=0)
    micro_batch: int = field("pairs per forward pass on one rank", 2, "pairs", gt=0)
    seq_length: int | None = field(
        "longest prompt and answer together; default: 1024, or the model's own limit when that is shorter",
        None,
        "tokens",
        gt=1,
    )
    prompt_length: int | None = field(
        "longest prompt, cut from the left; default: half of seq_length (512)", None, "tokens", gt=0
    )
    beta2: Float = field("AdamW's second beta (the first is 0.9, eps 1e-8)", 0.999, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] | None = field(
        "arithmetic of the matrix products and weights of the output; default: bf16 on a GPU, fp32 on a CPU",
        None,
    )
    seed: int = field("seed of shuffling and of the held-out pairs", 42, ge=0, lt=2**32)
    heldout_rows: int = field(
        "pairs kept from training and evaluated; at most a tenth of the data", 500, "pairs", ge=0
    )
    save_every: Steps = field("interval of evaluation and of checkpoints to resume from", 100, "steps", ge=1)


class Tail(Section):
    """What follows pretraining: settings of `smol sft` and `smol dpo`, where they are not SmolLM2's own."""

    sft: Sft | None = field("supervised fine-tuning", None)
    dpo: Dpo | None = field("direct preference optimisation", None)
