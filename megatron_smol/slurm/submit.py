"""`smol submit`: the batch script of a run, written out and given to sbatch; what was submitted stays on record.

The run folder keeps slurm/recipe.yaml (resolved; what the job reads, so that editing the file later does not change a
waiting job), slurm/job.sh, and one row a submission in slurm/submissions.jsonl: job, code version, shape.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_smol.data.files import write_whole
from megatron_smol.errors import UserError
from megatron_smol.recipe.checks import check_recipe
from megatron_smol.recipe.load import dump_recipe
from megatron_smol.recipe.schema import Recipe
from megatron_smol.slurm import clients
from megatron_smol.slurm.legs import append_row

SUBMISSIONS = "slurm/submissions.jsonl"
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shape:
    """What the job asks of Slurm. spares: nodes beyond `nodes` that wait to replace a lost one."""

    nodes: int
    gpus_per_node: int = 8
    cpus_per_task: int = 12
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    spares: int = 0
    save_lead_seconds: int = 300


def render(recipe: Recipe, shape: Shape) -> str:
    """The batch script."""
    run = recipe.run_path.absolute()
    leg = f"{leg_command()} {shlex.quote(str(run / 'slurm/recipe.yaml'))}"
    return "\n".join([*header(recipe.name, run / "slurm", shape), leg, ""])


def leg_command() -> str:
    """What a job runs, with the recipe as its only argument."""
    return f"exec {shlex.quote(sys.executable)} -m megatron_smol.slurm.leg"


def header(name: str, logs: Path, shape: Shape, array: int = 0, by: str = "smol submit") -> list[str]:
    """The lines before the command. logs: folder of the job's log; array: elements, 0 for a job of its own."""
    options = {
        **({"array": f"0-{array - 1}"} if array else {}),
        "job-name": name,
        "nodes": shape.nodes + shape.spares,
        "ntasks-per-node": max(shape.gpus_per_node, 1),
        **({"gpus-per-node": shape.gpus_per_node} if shape.gpus_per_node else {}),
        "cpus-per-task": shape.cpus_per_task,
        "mem": 0,
        "time": shape.time,
        **({"partition": shape.partition} if shape.partition else {}),
        **({"account": shape.account} if shape.account else {}),
        "signal": f"USR1@{shape.save_lead_seconds}",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": logs / f"%x-{'%A_%a' if array else '%j'}.log",
    }
    flags = ["exclusive", "requeue", *(["no-kill"] if shape.spares else [])]
    threads = max(shape.cpus_per_task * 2 // 3, 1)
    return [
        "#!/usr/bin/env bash",
        f"# {name}, written by `{by}`; examples/smollm2_1.7b.sh explains every line.",
        # `exclusive` gives a node's cores, and its memory only by the cores asked for where DefMemPerCPU is set.
        "# --mem=0: all memory of the nodes, whatever DefMemPerCPU says.",
        *(f"#SBATCH --{option}={_quoted(str(value))}" for option, value in options.items()),
        *(f"#SBATCH --{flag}" for flag in flags),
        f"export SPARES={shape.spares} OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}",
    ]


def _quoted(value: str) -> str:
    """For an #SBATCH line, which sbatch reads by rules of its own: a space would end the value, a # begins a comment."""
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"' if re.search(r"""[\s"'#\\]""", value) else value


def require_layout(recipe: Recipe, shape: Shape) -> None:
    """UserError where the recipe does not go with as many ranks as the job will have: it would find that out after the queue."""
    ranks = shape.nodes * max(shape.gpus_per_node, 1)
    parallel = recipe.parallel.model_copy(update={"gpus": ranks})
    try:
        check_recipe(recipe.model_copy(update={"parallel": parallel}))
    except ValueError as error:
        a_node = f"{ranks // shape.nodes} on each of {shape.nodes} nodes"
        raise UserError(f"a job of {ranks} ranks ({a_node}) cannot train {recipe.name}: {error}") from None


def submit(recipe: Recipe, shape: Shape) -> str:
    """Write the script, give it to sbatch, record it; the job's id."""
    folder = recipe.run_path / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"run_dir is {recipe.run_path}, and a file is where its folder should be; choose another"
        ) from None
    script = folder / "job.sh"
    write_whole(folder / "recipe.yaml", dump_recipe(recipe))
    write_whole(script, render(recipe, shape))
    job = clients.ask("sbatch", "--parsable", str(script)).split(";")[0]
    append_row(
        recipe.run_path / SUBMISSIONS,
        {"job": job, **code_version(), "nodes": shape.nodes, "shape": vars(shape)},
    )
    return job


def code_version() -> dict[str, Any]:
    """Package version and, in a checkout, the commit and whether files differ from it."""
    found: dict[str, Any] = {"version": version("megatron-smol"), "commit": None, "changed": None}
    if (PACKAGE.parent / ".git").exists():
        found["commit"] = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
        found["changed"] = None if changes is None else bool(changes)
    return found


def _git(*arguments: str) -> str | None:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()
