"""`smol plan`, `train`, `doctor`: a recipe from arithmetic to a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_smol.commands.arguments import Overrides, RecipePath
from megatron_smol.errors import UserError
from megatron_smol.prepare import prepare_libraries

if TYPE_CHECKING:
    from megatron_smol.recipe.plan import Plan


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Tokens/s of one GPU, for days and GPU-hours.", min=1.0)
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="GPUs to fit the recipe to, as 64xH100-80GB (A100, H100, H200, B200, L40S): prints the layouts "
            "and micro-batches that fit, fastest first, and why others do not.",
            metavar="CLUSTER",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="With --fit: what `smol bench train --json` measured, in place of the speed model's own."
        ),
    ] = None,
) -> None:
    """Work out what a recipe will do: steps, tokens and epochs per source, LR, memory, days. Needs no GPU, no data.

    With --fit: which layout to run it in on given GPUs. Exit code 2 when a source is read more often than its
    max_epochs allows, or when no layout fits.
    """
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes
    from megatron_smol.recipe.render import print_plan

    loaded = load_recipe(recipe, overrides or [])
    made = make_plan(loaded, resolve_sizes(loaded))
    if fit is not None:
        _print_fit(made, fit, calibration, json)
        return
    if calibration is not None:
        raise UserError("--calibration goes with --fit, such as --fit 64xH100-80GB")
    print_plan(made, tokens_per_second, as_json=json)
    made.require_no_errors()


def _print_fit(made: Plan, cluster: str, calibration: Path | None, as_json: bool) -> None:
    from megatron_smol.recipe.devices import parse_cluster
    from megatron_smol.recipe.fit import fit
    from megatron_smol.recipe.fit_view import print_fit
    from megatron_smol.recipe.speed import Calibration

    measured = None if calibration is None else Calibration.from_file(calibration)
    print_fit(fit(made, parse_cluster(cluster), measured), as_json)


def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train all stages of a recipe; the same command continues a run that was stopped.

    Several ranks: torchrun --nproc-per-node 2 -m megatron_smol train RECIPE. Exit codes of a rank: 0 done, 75 stopped by
    a signal after saving, or by the watchdog (run again), 2 recipe, 3 data, 4 checkpoint, 5 the numbers (guard), 6 no room on the disk, 7 the
    run folder is a later start's; torchrun itself makes 1 of all of them, srun keeps them.
    """
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.train.signals import StopFlag

    loaded = load_recipe(recipe, overrides or [])
    stop = StopFlag(loaded.run_path)
    stop.install()
    prepare_libraries()
    from megatron_smol.train.run import train as run

    raise typer.Exit(run(loaded, stop))


def doctor() -> None:
    """Say what this machine offers and what is in the way; exit code 2 when something must be mended."""
    prepare_libraries()
    from megatron_smol.doctor import print_findings

    raise typer.Exit(0 if print_findings() else 2)
