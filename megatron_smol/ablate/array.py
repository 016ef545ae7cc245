"""An ablation as one Slurm array: an element a run, each of which saves, requeues and continues itself like `smol submit`'s."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from megatron_smol.ablate.config import Ablation
from megatron_smol.ablate.recipes import Run
from megatron_smol.ablate.run import recipe_file
from megatron_smol.data.files import write_whole
from megatron_smol.slurm import clients
from megatron_smol.slurm.legs import append_row, position
from megatron_smol.slurm.submit import SUBMISSIONS, Shape, code_version, header, leg_command, require_layout

SCRIPT = "slurm/array.sh"


@dataclass(frozen=True)
class Submitted:
    job: str
    runs: list[Run]


def unfinished(runs: list[Run]) -> list[Run]:
    return [run for run in runs if not position(run.plan).finished]


def render(config: Ablation, runs: list[Run], shape: Shape) -> str:
    """The batch script of `runs`, as `smol submit` would write it for one, with the array around it.

    Slurm's array variables are taken away before the job starts: with them a job is a link in a chain of one run, and
    does not requeue itself.
    """
    logs = config.output.absolute() / "slurm"
    files = [shlex.quote(str(recipe_file(config, run).absolute())) for run in runs]
    return "\n".join(
        [
            *header(config.name, logs, shape, array=len(runs), by="smol ablate --submit"),
            "RECIPES=(",
            *(f"  {file}" for file in files),
            ")",
            'RECIPE="${RECIPES[$SLURM_ARRAY_TASK_ID]}"',
            "unset SLURM_ARRAY_TASK_ID SLURM_ARRAY_JOB_ID",
            f'{leg_command()} "$RECIPE"',
            "",
        ]
    )


def submit(config: Ablation, runs: list[Run], shape: Shape) -> Submitted | None:
    """Give Slurm what is not finished, as one array; None when nothing is left. Raises UserError when Slurm refuses."""
    todo = unfinished(runs)
    if not todo:
        return None
    for run in todo:
        require_layout(run.recipe, shape)
    script = config.output / SCRIPT
    script.parent.mkdir(parents=True, exist_ok=True)
    write_whole(script, render(config, todo, shape))
    job = clients.ask("sbatch", "--parsable", str(script)).split(";")[0]
    for index, run in enumerate(todo):
        row = {"job": f"{job}_{index}", **code_version(), "nodes": shape.nodes, "shape": vars(shape)}
        append_row(run.recipe.run_path / SUBMISSIONS, row)
    return Submitted(job, todo)
