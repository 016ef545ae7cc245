"""`smol curate`: raw text to curated text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_smol.errors import UserError, nearest

# The files that come with the repository: `smol curate NAME`.
SHIPPED = Path(__file__).parent.parent.parent / "examples" / "curate"

_HELP = """Filter, deduplicate and decontaminate raw text by a curation file, or by the name of a shipped one.

Runs datatrove's pipelines over JSON lines, parquet or WARC files, on this machine or (slurm: in the file) as array
jobs. Writes OUTPUT/documents/*.jsonl.zst, which `smol preprocess` reads, and OUTPUT/card.html: what each step
kept and dropped, why, with examples. Given again after a kill, the same command continues; what was done stays.

Shipped (examples/curate/NAME.yaml): fineweb-edu, dclm-mix, dclm-edu, finemath-pages, finemath, finemath-4plus,
infi-webmath, stack-edu, long-context. Copy one to change its steps; docs/curation.md lists all steps.

Exit codes: 0 done, 2 a mistake in the file or the command, 3 an input that cannot be read, 5 a worker that was killed.

\b
  smol curate fineweb-edu --input 'raw/*.warc.gz' --output data/fineweb-edu
  smol curate my.yaml --input 'raw/*.jsonl.gz' --output data/curated
  smol curate stack.yaml --recipe examples/smollm2_1.7b.yaml --source stack_edu --tokenizer HuggingFaceTB/SmolLM2-1.7B
  smol preprocess data/curated/documents --output data/web --tokenizer HuggingFaceTB/SmolLM2-135M
"""


def curate(
    config: Annotated[
        Path, typer.Argument(help="Curation file, or the name of a shipped one.", metavar="CONFIG|NAME")
    ],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Files, folders or globs in place of the file's own.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder in place of the file's own.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at once; default: one a core.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Counts tokens for the card.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A training recipe: the card tells how often its stages would read this set."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="With --recipe: its source that this set stands for; default: of the same name."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output of another configuration.")] = False,
) -> None:
    if source is not None and recipe is None:
        raise UserError(f"--source {source} is a source of a recipe; name its file with --recipe")
    epochs = {"recipe": recipe, "source": source} if recipe else None
    given = {"output": output, "workers": workers, "tokenizer": tokenizer, "epochs": epochs}
    overrides = {name: value for name, value in given.items() if value is not None}
    try:
        from megatron_smol.curate.config import load_curation
        from megatron_smol.curate.pipeline import curate as run

        loaded = load_curation(file_of(config), overrides, inputs)
        card = run(loaded, overwrite=overwrite)
    except ImportError as error:  # of this package's modules, or of what a step needs
        raise UserError(
            f"smol curate needs the extra `curate` ({error}): pip install 'megatron-smol[curate]'"
        ) from None
    print(card if card else f"submitted; squeue shows the jobs, {loaded.output}/card.html comes last")


curate.__doc__ = _HELP


def file_of(given: Path) -> Path:
    """A file, or that of a shipped name."""
    if given.is_file():
        return given
    names = [path.stem for path in sorted(SHIPPED.glob("*.yaml")) if "\nparts:" not in path.read_text()]
    if str(given) in names:
        return SHIPPED / f"{given}.yaml"
    chat = (SHIPPED / f"{given}.yaml").is_file()
    raise UserError(
        f"{given} is chat data: smol chatdata examples/curate/{given}.yaml"
        if chat
        else f"no curation file {given}; give a file or a shipped name, {nearest(str(given), names)}"
    )
