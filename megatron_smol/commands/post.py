"""`smol generate`: what an exported model says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="An exported Hugging Face folder.", metavar="HF_DIR")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue.", metavar="PROMPT")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of each continuation.", min=1)] = 40,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0.0)] = 0.7,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write [{prompt, text, model}] here.")] = None,
) -> None:
    """Let an exported model continue some text."""
    import json as json_module

    from rich.console import Console

    from megatron_smol.post.generate import PROMPTS, generate_samples

    samples = generate_samples(model, prompts or PROMPTS, max_new_tokens, temperature, seed)
    console = Console(soft_wrap=True, highlight=False)
    for sample in samples:
        console.print(sample["prompt"], style="bold", end="", markup=False)
        console.print(sample["text"] + "\n", markup=False)
    if json is not None:
        rows = [{**sample, "model": str(model)} for sample in samples]
        json.write_text(json_module.dumps(rows, indent=1, ensure_ascii=False) + "\n")
