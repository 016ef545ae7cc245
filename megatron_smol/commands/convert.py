"""`smol convert`: checkpoints to and from Hugging Face folders, and GGUF files to Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_smol.prepare import prepare_libraries

convert_app = typer.Typer(
    no_args_is_help=True,
    help="Checkpoints to and from Hugging Face folders: streamed, and published only if both models agree.",
)

Tokenizer = Annotated[str | None, typer.Option(help="Hub name or folder; default: the model's own.")]
Text = Annotated[Path | None, typer.Option(help="Text to compare on; default: a page of ours.")]
Report = Annotated[
    Path | None, typer.Option(help="JSON of what was compared, also if refused; a .txt is written beside it.")
]
Interleaved = Annotated[
    bool,
    typer.Option(
        "--rope-interleaved",
        help="The checkpoint's rotary rows are interleaved pairs (nanotron, Megatron --rotary-interleaved).",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds a model.")]


@convert_app.command("to-hf")
def convert_to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of any layout, or a run (its newest).", metavar="CKPT")
    ],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.", metavar="OUT")],
    tokenizer: Tokenizer = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; default: as trained.")] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest safetensors file; with more than one, an index is written.")
    ] = "50GB",
    rope_interleaved: Interleaved = False,
    text: Text = None,
    report: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a checkpoint for transformers; written only if logits, loss and greedy text are the trainer's.

    One process, no GPU, about one layer of memory. Example: smol convert to-hf runs/demo out --report out.json
    """
    prepare_libraries()
    from megatron_smol.checkpoint.convert import to_hf

    to_hf(
        checkpoint,
        out,
        tokenizer=tokenizer,
        dtype=dtype,
        max_shard_size=max_shard_size,
        rope_interleaved=rope_interleaved,
        text=text,
        report=report,
        overwrite=overwrite,
    )


@convert_app.command("from-hf")
def convert_from_hf(
    model: Annotated[
        str, typer.Argument(help="A Llama-format folder, a hub name, or a SmolLM2 .gguf file.", metavar="HF")
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write.", metavar="OUT")],
    tokenizer: Tokenizer = None,
    rope_interleaved: Interleaved = False,
    text: Text = None,
    report: Report = None,
    overwrite: Overwrite = False,
) -> None:
    """Import a Hugging Face model as a weights-only checkpoint; written only if both compute the same.

    To train on from it, name OUT in the recipe: init_from: {path: OUT, what: weights}.
    """
    prepare_libraries()
    from megatron_smol.checkpoint.convert import from_hf

    from_hf(
        model,
        out,
        tokenizer=tokenizer,
        rope_interleaved=rope_interleaved,
        text=text,
        report=report,
        overwrite=overwrite,
    )


@convert_app.command("gguf-to-hf")
def convert_gguf_to_hf(
    model: Annotated[Path, typer.Argument(help="A SmolLM2 .gguf file.", metavar="GGUF")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write, in fp32.", metavar="OUT")],
    overwrite: Overwrite = False,
) -> None:
    """Write a GGUF file as a Hugging Face folder, with the tokenizer that SmolLM2 was published with."""
    prepare_libraries()
    from megatron_smol.checkpoint.gguf import write_hf_folder
    from megatron_smol.checkpoint.publish import published

    with published(out, overwrite) as aside:
        write_hf_folder(model, aside)
    print(f"wrote {out}")
