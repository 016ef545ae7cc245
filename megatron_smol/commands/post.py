"""`smol generate`, `sft`, `dpo`, `chat`: what becomes of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="An exported Hugging Face folder.", metavar="HF_DIR")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue; a few of our own when none is given.", metavar="PROMPT"),
    ] = None,
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


ModelFolder = Annotated[Path, typer.Argument(help="An exported Hugging Face folder.", metavar="HF_DIR")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, as name=value: lr=1e-4 epochs=1", metavar="a=b"),
]
OutputFolder = Annotated[
    Path, typer.Option(help="Folder to write: a Hugging Face model, metrics, TensorBoard.")
]
RecipeFile = Annotated[Path | None, typer.Option(help="Take the settings of this recipe's `tail:` section.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="A bad row is an error; without it it is skipped and named.")
]
Overwrite = Annotated[bool, typer.Option(help="Replace what was made from another model, data or settings.")]


def sft(
    model: ModelFolder,
    settings: Settings = None,
    *,
    output: OutputFolder,
    data: Annotated[
        str | None,
        typer.Option(
            help='Rows with "messages": FILE (JSONL, .gz, parquet) or hub OWNER/NAME:CONFIG:SPLIT; default: the '
            "recipe's, else SmolLM2's."
        ),
    ] = None,
    recipe: RecipeFile = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model on conversations (TRL), by SmolLM2's settings for its size.

    Settings are the fields of tail.sft in docs/recipe.md. The same command continues after a kill and does nothing
    when all is done. Several GPUs: accelerate launch --config_file examples/accelerate/fsdp.yaml -m megatron_smol sft
    HF_DIR ... Put the output into the run's folder (RUN/sft) and `smol report RUN` draws it.
    """
    from megatron_smol.post.sft import sft as run
    from megatron_smol.post.tail import Request

    request = Request("sft", model, output, data, recipe, settings or [], strict, overwrite)
    raise typer.Exit(run(request))


def dpo(
    model: ModelFolder,
    settings: Settings = None,
    *,
    output: OutputFolder,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows with prompt, chosen, rejected: FILE (JSONL, .gz, parquet) or hub OWNER/NAME:CONFIG:SPLIT; "
            "default: the recipe's, else SmolLM2's."
        ),
    ] = None,
    recipe: RecipeFile = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Teach a fine-tuned model preferences (DPO by TRL), by SmolLM2's settings for its size.

    HF_DIR is both the start and the reference. Settings are the fields of tail.dpo in docs/recipe.md. The same
    command continues after a kill and does nothing when all is done. Several GPUs: accelerate launch --config_file
    examples/accelerate/fsdp.yaml -m megatron_smol dpo HF_DIR ... Put the output into RUN/dpo for `smol report RUN`.
    """
    from megatron_smol.post.dpo import dpo as run
    from megatron_smol.post.tail import Request

    request = Request("dpo", model, output, data, recipe, settings or [], strict, overwrite)
    raise typer.Exit(run(request))


def chat(
    model: Annotated[
        Path,
        typer.Argument(
            help="A chat model's folder, a run's folder (its dpo or sft, else its last checkpoint) or a checkpoint.",
            metavar="MODEL",
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this one question on stdout and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System turn; default: the template's own.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0.0)] = 0.2,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest that make up this share.", min=0.01, max=1.0)
    ] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Talk to a model in the terminal: /reset, /system TEXT, /quit; Ctrl-C stops an answer, not the program."""
    from rich.console import Console

    from megatron_smol.post.chat import Chat, Sampling, answer_once, chat_model, converse

    console = Console(highlight=False, soft_wrap=True, stderr=prompt is not None)
    with chat_model(model, console) as folder:
        opened = Chat.open(folder, Sampling(max_new_tokens, temperature, top_p, seed), system)
        if prompt is not None:
            answer_once(opened, prompt)
        else:
            converse(opened, console)
