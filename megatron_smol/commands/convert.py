"""`smol convert`: checkpoints to and from Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_smol.prepare import prepare_libraries

convert_app = typer.Typer(
    no_args_is_help=True, help="Checkpoints to and from Hugging Face folders, logits compared."
)


@convert_app.command("to-hf")
def convert_to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of any layout.", metavar="CKPT")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.", metavar="OUT")],
    tokenizer: Annotated[str | None, typer.Option(help="Hub name or folder; default: the run's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; default: as trained.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; default: a page of ours.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it holds a model.")] = False,
) -> None:
    """Export a checkpoint for transformers; written only if logits, loss and greedy text are the trainer's."""
    prepare_libraries()
    from megatron_smol.checkpoint.convert import to_hf

    to_hf(checkpoint, out, tokenizer=tokenizer, dtype=dtype, text=text, overwrite=overwrite)


@convert_app.command("from-hf")
def convert_from_hf(
    model: Annotated[str, typer.Argument(help="A Llama-format folder, or a hub name.", metavar="HF")],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write.", metavar="OUT")],
    tokenizer: Annotated[str | None, typer.Option(help="Hub name or folder; default: the model's.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; default: a page of ours.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it holds a model.")] = False,
) -> None:
    """Import a Hugging Face model as a weights-only checkpoint; written only if both compute the same."""
    prepare_libraries()
    from megatron_smol.checkpoint.convert import from_hf

    from_hf(model, out, tokenizer=tokenizer, text=text, overwrite=overwrite)
