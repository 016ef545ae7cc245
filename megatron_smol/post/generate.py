"""Text from an exported model: what `smol generate` prints and the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_smol.errors import CheckpointError

PROMPTS = ("The purpose of this module is", "def read_file(path):", "Question: What is 12 + 30?\nAnswer:")


def generate_samples(
    hf_folder: Path,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Continue each prompt; returns [{"prompt", "text"}], text being the new part.

    temperature 0 takes the likeliest token each time; above, tokens are drawn among the likeliest that make
    up 95 %. The same seed gives the same text.
    """
    import torch

    model, tokenizer = load_model(hf_folder)
    samples = []
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", add_special_tokens=False)[
            "input_ids"
        ]
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": 0.95}
            if temperature
            else {"do_sample": False}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
                **sampling,
            )
        text = tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text})
    return samples


def load_model(hf_folder: Path) -> tuple[Any, Any]:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (hf_folder / "config.json").is_file():
        raise CheckpointError(
            f"{hf_folder} has no config.json, so it is no Hugging Face model folder; make one with "
            "`smol convert to-hf CHECKPOINT OUT`"
        )
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(hf_folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(hf_folder, local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds
        text = str(error).strip().splitlines()
        raise CheckpointError(
            f"{hf_folder} cannot be loaded: {text[0] if text else type(error).__name__}"
        ) from error
    return model.eval(), tokenizer
