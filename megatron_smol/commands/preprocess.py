"""`smol preprocess`: text into tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def preprocess(
    inputs: Annotated[
        list[str],
        typer.Argument(help="JSONL (.gz, .zst), parquet or text files, or globs.", metavar="INPUT..."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the source: token shards and manifest.json.")],
    tokenizer: Annotated[str, typer.Option(help="Hub name, or a local folder with tokenizer.json.")],
    json_key: Annotated[str, typer.Option(help="Key (or column) that holds the text.")] = "text",
    source: Annotated[str | None, typer.Option(help="Name of the source; default: the folder's.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one a core. The output is the same.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the documents.")] = 0,
    append_eod: Annotated[
        bool, typer.Option(help="End each document with the tokenizer's end-of-text id.")
    ] = True,
    backend: Annotated[
        Literal["auto", "hf"],
        typer.Option(
            help="Tokenizer library: auto (the fast one where its ids are equal), or hf (the reference)."
        ),
    ] = "auto",
    skip_bad: Annotated[
        bool, typer.Option(help="Count and skip bad rows; without it the first one is an error.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what was made with other settings.")] = False,
) -> None:
    """Tokenize text into a source that recipes (and megatron-core) read. Run it again to continue after a kill."""
    from megatron_smol.data.tokenize import preprocess as run

    run(
        inputs,
        output,
        tokenizer,
        json_key=json_key,
        source=source,
        workers=workers,
        seed=seed,
        append_eod=append_eod,
        backend=backend,
        skip_bad=skip_bad,
        overwrite=overwrite,
    )
