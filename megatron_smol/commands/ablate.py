"""`smol ablate`: compare mixtures by small runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_HELP = """Compare candidate mixtures: small runs that differ in their data alone, over several seeds.

From scratch, or (from: in the file) annealing from a checkpoint of a run: a share of the candidate in the running
mixture, the LR straight to zero, as SmolLM2 chose its maths and code data. Prints first what each run will read and
how many epochs of each source that makes, then trains, and ends with a ranking: losses on every source and
evaluations, with standard errors over seeds, the difference to the control, whether the seeds can tell it from
noise, and the cost. Several shares and budgets in the file make a grid. Given again, the same command goes on.
What was found is OUTPUT/results.json; `smol rebalance` reads it.

\b
  smol ablate examples/ablation_math.yaml --dry-run
  smol ablate examples/ablation_math.yaml
  smol ablate examples/ablation_math.yaml --submit --nodes 8        # a Slurm array, an element a run
  bash examples/ablation_demo.sh                                    # all of it on a laptop, in minutes
"""


def ablate(
    config: Annotated[
        Path, typer.Argument(help="Ablation file; see examples/ablation_math.yaml.", metavar="CONFIG")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the runs would read.")] = False,
    results: Annotated[bool, typer.Option("--results", help="Only print the table of what is done.")] = False,
    submit: Annotated[
        bool,
        typer.Option(
            "--submit",
            help="Give the runs that are not done to Slurm, as an array. Afterwards the command without it evaluates and "
            "prints the table.",
        ),
    ] = False,
    nodes: Annotated[int, typer.Option(help="With --submit: nodes of a run.", min=1)] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(help="With --submit: GPUs, and ranks, of a node; 0: one CPU rank.", min=0)
    ] = 8,
    cpus_per_task: Annotated[int, typer.Option(help="With --submit: cores of a rank.", min=1)] = 12,
    time: Annotated[str, typer.Option(help="With --submit: limit of one leg.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="With --submit: Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="With --submit: Slurm's account.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    import json as jsonlib

    from rich.console import Console

    from megatron_smol.ablate import results as outcome
    from megatron_smol.ablate.array import submit as submit_array
    from megatron_smol.ablate.config import load_ablation
    from megatron_smol.ablate.recipes import require_checkpoint, require_rank_by, runs_of
    from megatron_smol.ablate.run import carry_out
    from megatron_smol.ablate.view import print_plan, print_results
    from megatron_smol.errors import UserError
    from megatron_smol.slurm.submit import Shape

    loaded = load_ablation(config)
    runs = runs_of(loaded)
    console = Console(stderr=json, highlight=False)
    if not results:
        print_plan(runs, console)
        require_rank_by(loaded, runs)
    if dry_run:
        try:
            require_checkpoint(runs)
        except UserError as error:
            console.print(f"note: {error}", markup=False, soft_wrap=True)
        return
    require_checkpoint(runs)
    if submit:
        shape = Shape(nodes, gpus_per_node, cpus_per_task, time, partition, account)
        array = submit_array(loaded, runs, shape)
        done = "every run is done" if array is None else f"array job {array.job} has {len(array.runs)} runs"
        console.print(f"{done}; for the table: smol ablate {config}", markup=False)
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
