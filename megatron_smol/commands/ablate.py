"""`smol ablate`: compare mixtures by small runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_HELP = """Compare candidate mixtures: small runs that differ in their data alone, over several seeds.

From scratch, or (from: in the file) annealing from a checkpoint of a run: a share of the candidate in the running
mixture, the LR straight to zero, as SmolLM2 chose its maths and code data. Prints first what each run will read and
how many epochs of each source that makes, then trains run after run, and ends with one table: losses on every
source and evaluations, with standard errors over seeds and the difference to the control. Given again, the same
command goes on.

\b
  smol ablate examples/ablation_math.yaml --dry-run
  smol ablate examples/ablation_math.yaml
  smol ablate examples/ablation_math.yaml --submit --nodes 8        # every run a Slurm job
"""


def ablate(
    config: Annotated[
        Path, typer.Argument(help="Ablation file; see examples/ablation_math.yaml.", metavar="CONFIG")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the runs would read.")] = False,
    results: Annotated[bool, typer.Option("--results", help="Only print the table of what is done.")] = False,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit every run that is not done as a Slurm job.")
    ] = False,
    nodes: Annotated[int, typer.Option(help="With --submit: nodes of a run.", min=1)] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    import json as jsonlib

    from rich.console import Console

    from megatron_smol.ablate import results as outcome
    from megatron_smol.ablate.config import load_ablation
    from megatron_smol.ablate.recipes import require_checkpoint, runs_of
    from megatron_smol.ablate.run import carry_out
    from megatron_smol.ablate.run import submit as submit_all
    from megatron_smol.ablate.view import print_plan, print_results

    loaded = load_ablation(config)
    runs = runs_of(loaded)
    console = Console(stderr=json, highlight=False)
    if not results:
        print_plan(runs, console)
    if dry_run:
        return
    require_checkpoint(runs)
    if submit:
        submit_all(runs, nodes, console)
        return
    if not results:
        carry_out(loaded, runs, console)
    found = outcome.collect(loaded, runs)
    outcome.write(loaded, found)
    if json:
        print(jsonlib.dumps(found.to_json(), indent=1))
    else:
        print_results(found, console)


ablate.__doc__ = _HELP
