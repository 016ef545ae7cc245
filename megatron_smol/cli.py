"""The command `smol`: one thin door per part of the package.

Each command imports what it needs when it is called, so that `smol plan` does not wait for torch. UserError
becomes one sentence and its exit code.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_smol.errors import DataError, UserError, leave, ranks_have_met
from megatron_smol.prepare import prepare_libraries

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The SmolLM2 recipe as one YAML, run by megatron-core: [bold]plan[/] → [bold]preprocess[/] → [bold]train[/] → "
    "[bold]convert[/] → [bold]report[/].",
)
convert_app = typer.Typer(
    no_args_is_help=True, help="Checkpoints to and from Hugging Face folders, logits compared."
)
app.add_typer(convert_app, name="convert")

RecipePath = Annotated[Path, typer.Argument(help="The recipe, such as examples/demo.yaml.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings to change, as dotted.name=value: lr.peak=1e-3 stages.decay.until=12T", metavar="a.b=c"
    ),
]


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Tokens/s of one GPU, for days and GPU-hours.", min=1.0)
    ] = None,
) -> None:
    """Work out what a recipe will do: steps, tokens and epochs per source, LR, memory, days. Needs no GPU, no data.

    Exit code 2 when a source is read more often than its max_epochs allows.
    """
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes
    from megatron_smol.recipe.render import print_plan

    loaded = load_recipe(recipe, overrides or [])
    made = make_plan(loaded, resolve_sizes(loaded))
    print_plan(made, tokens_per_second, as_json=json)
    made.require_no_errors()


@app.command()
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


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train all stages of a recipe; the same command continues a run that was stopped.

    Several ranks: torchrun --nproc-per-node 2 -m megatron_smol train RECIPE. Exit codes of a rank: 0 done, 75 stopped by
    a signal after saving (run again), 2 recipe, 3 data, 4 checkpoint, 5 the loss is not a number; torchrun itself makes
    1 of all of them, srun keeps them.
    """
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.train.signals import StopFlag

    loaded = load_recipe(recipe, overrides or [])
    stop = StopFlag()
    stop.install()
    prepare_libraries()
    from megatron_smol.train.run import train as run

    raise typer.Exit(run(loaded, stop))


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="The step whose batch to show; the first is 1.")] = 1,
    stage: Annotated[
        str | None, typer.Option(help="Its stage, where branches make the step ambiguous.")
    ] = None,
    index_only: Annotated[
        bool, typer.Option(help="Sources, epochs and windows only; needs no data on disk.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what any step read or will read: every row of its batch, decoded, with its source."""
    from megatron_smol.data.inspect import inspect_batch
    from megatron_smol.recipe.load import load_recipe

    inspect_batch(load_recipe(recipe, overrides or []), stage, step, index_only, json)


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


@app.command()
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


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/demo.", metavar="RUN")],
) -> None:
    """Write RUN/report.html: losses, mixtures, ledger, validation, samples, in one self-contained file."""
    from megatron_smol.report.render import write_report

    print(write_report(run))


@app.command()
def doctor() -> None:
    """Say what this machine offers and what is in the way; exit code 2 when something must be mended."""
    prepare_libraries()
    from megatron_smol.doctor import print_findings

    raise typer.Exit(0 if print_findings() else 2)


def main() -> None:
    """The command: always ends with SystemExit, an error told in one sentence."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        if _is_mine_to_tell(error):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        what = f"{error.strerror}: {error.filename or 'a file'}"
        print(f"error: {what}; mend that, then run again", file=sys.stderr)
        sys.exit(DataError.exit_code)


def entry() -> None:
    """Entry point of `smol` and `python -m megatron_smol`: `main` in a process of its own."""
    try:
        main()
    except SystemExit as done:
        leave(done.code if isinstance(done.code, int) else 0 if done.code is None else 1)


def _is_mine_to_tell(error: UserError) -> bool:
    """What all ranks found alike is told by the first of them: an error they shared, or one before they met."""
    return os.environ.get("RANK", "0") == "0" or (ranks_have_met() and not error.alike)
