"""`smol data`: look after sources of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_smol.errors import DataError

data_app = typer.Typer(
    no_args_is_help=True, help="Sources of tokens: verify their files, describe them, pack their documents."
)

SourcePath = Annotated[
    str,
    typer.Argument(
        help="A folder with manifest.json, a Megatron .bin/.idx prefix, or an address (s3://...).",
        metavar="SOURCE",
    ),
]


@data_app.command("verify")
def verify_sources(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Source folders, prefixes or addresses; a recipe (.yaml) stands for all of its sources.",
            metavar="SOURCE...|RECIPE",
        ),
    ],
    deep: Annotated[
        bool,
        typer.Option(
            help="Read every byte: checksums, index tables, ids below the vocabulary, ends of documents."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Compare sources with their manifests: sizes, headers and counts; with --deep every byte.

    Names every damaged file, not only the first. Exit code 3 when there is one.
    """
    from megatron_smol.data.verify import verify

    if not verify(sources, deep, json):
        raise typer.Exit(DataError.exit_code)


@data_app.command("card")
def card(
    source: SourcePath,
    tokenizer: Annotated[
        str | None, typer.Option(help="For the samples; default: the one that the manifest names.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Say how many epochs of the source this recipe makes.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the card; default: beside the manifest.")
    ] = None,
) -> None:
    """Write card.md and card.html: sizes, inputs, document lengths, samples of a source."""
    from megatron_smol.data.card import write_card

    print(write_card(source, tokenizer=tokenizer, recipe=recipe, output=output))


@data_app.command("pack")
def pack(
    source: SourcePath,
    length: Annotated[
        int, typer.Option(help="Tokens of a window: the seq_length of the stages that read it.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the packed source.")],
) -> None:
    """Copy a source so that windows hold whole documents (best-fit packing; padding carries no loss).

    Documents longer than a window are cut into whole windows and a rest. Run it again to continue after a kill.
    """
    from megatron_smol.data.packing import pack_source

    made = pack_source(source, length, output)
    assert made.packed is not None
    padding = made.packed["padding_tokens"]
    print(
        f"{output}: {made.tokens // length:,} windows of {length:,} tokens; {made.packed['documents']:,} documents, "
        f"{made.packed['cut_documents']:,} of them cut because they are longer; padding {padding:,} tokens "
        f"({padding / made.tokens:.3%})"
    )
