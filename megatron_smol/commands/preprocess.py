"""`smol preprocess`: text into tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_HELP = """Tokenize text into a source that recipes (and megatron-core) read.

Reads JSON lines (.jsonl, .json, plain or .gz/.zst), parquet and text files (.txt: one document each); local
files, folders and globs, URLs (s3://, gs://, https://), or a hub data set. Writes token shards, a manifest, a page
about the source (card.html) and, for each shard, which document of which file each of its documents is. The ids are
Hugging Face's. Special tokens written in the text stay text.

Given again after a kill, the same command continues; at most one block (32 MB) a worker is done again. The output
depends on neither the workers nor the kills.

\b
  smol preprocess web/*.jsonl.zst --output data/web --tokenizer HuggingFaceTB/SmolLM2-135M
  smol preprocess books --output data/long --tokenizer tokenizers/smollm2 --min-doc-tokens 8192
  smol preprocess --hub-dataset HuggingFaceTB/smollm-corpus --hub-config cosmopedia-v2 \\
      --output data/cosmopedia --tokenizer HuggingFaceTB/SmolLM2-135M
  smol preprocess s3://bucket/web --output data/web --tokenizer t --rank slurm --world-size slurm

The last is one task of an array job: each does its share, none waits, the one that ends last writes the shards
(examples/preprocess.sh).
"""


def preprocess(
    output: Annotated[Path, typer.Option(help="Folder of the source: token shards and manifest.json.")],
    tokenizer: Annotated[str, typer.Option(help="Hub name, or a local folder with tokenizer.json.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="JSON lines, parquet or text: files, folders, globs or URLs.", metavar="[INPUT]..."
        ),
    ] = None,
    json_key: Annotated[str, typer.Option(help="Key (or column) that holds the text.")] = "text",
    source: Annotated[str | None, typer.Option(help="Name of the source; default: the folder's.")] = None,
    min_doc_tokens: Annotated[
        int | None,
        typer.Option(
            help="Leave out shorter documents (tokens of the text, without the end), e.g. for long context."
        ),
    ] = None,
    max_doc_tokens: Annotated[int | None, typer.Option(help="Leave out longer documents.")] = None,
    skip_bad: Annotated[
        bool, typer.Option(help="Count and skip bad rows; without it the first one is an error.")
    ] = False,
    hub_dataset: Annotated[
        str | None, typer.Option(help="Instead of INPUT: a hub data set, OWNER/NAME, or its local copy.")
    ] = None,
    hub_config: Annotated[str | None, typer.Option(help="Its configuration (subset).")] = None,
    hub_split: Annotated[str, typer.Option(help="Its split.")] = "train",
    hub_revision: Annotated[str | None, typer.Option(help="Its branch, tag or commit.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the documents.")] = 0,
    shuffle: Annotated[
        bool, typer.Option(help="Shuffle the documents of the whole input; else keep its order.")
    ] = True,
    append_eod: Annotated[
        bool, typer.Option(help="End each document with the tokenizer's end-of-text id.")
    ] = True,
    provenance: Annotated[
        bool,
        typer.Option(help="Write <shard>.docs.npy: input, row and tokens of each document (28 bytes each)."),
    ] = True,
    backend: Annotated[
        Literal["auto", "hf"],
        typer.Option(
            help="Tokenizer library: auto (the fast one where its ids are equal), or hf (the reference)."
        ),
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, a core and about 0.6 GB each; default: one a core. The output is the same."
        ),
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="This task of an array job, from 0; 'slurm': SLURM_ARRAY_TASK_ID.")
    ] = None,
    world_size: Annotated[
        str | None, typer.Option(help="Tasks of the array job; 'slurm': SLURM_ARRAY_TASK_COUNT.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what was made with other settings.")] = False,
) -> None:
    from megatron_smol.data.array_job import share_of
    from megatron_smol.data.card import write_card
    from megatron_smol.data.inputs import hub_inputs
    from megatron_smol.data.tokenize import preprocess as run
    from megatron_smol.errors import UserError

    if bool(inputs) == bool(hub_dataset):
        raise UserError("give either INPUT files or --hub-dataset: one of them, and not both")
    files = hub_inputs(hub_dataset, hub_config, hub_split, hub_revision) if hub_dataset else inputs or []
    manifest = run(
        files,
        output,
        tokenizer,
        json_key=json_key,
        source=source,
        min_doc_tokens=min_doc_tokens,
        max_doc_tokens=max_doc_tokens,
        skip_bad=skip_bad,
        seed=seed if shuffle else None,
        append_eod=append_eod,
        provenance=provenance,
        backend=backend,
        workers=workers,
        share=share_of(rank, world_size),
        overwrite=overwrite,
    )
    if manifest is not None:
        write_card(output, tokenizer)


preprocess.__doc__ = _HELP
