"""Carries an ablation out: every run by `smol train`, which continues what was interrupted; then evaluation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from megatron_smol.ablate.config import Ablation, Evaluation
from megatron_smol.ablate.recipes import Run
from megatron_smol.data.files import write_whole
from megatron_smol.errors import EXIT_RESTART_ME, RunError
from megatron_smol.recipe.load import dump_recipe
from megatron_smol.slurm.legs import position


def carry_out(config: Ablation, runs: list[Run], console: Console) -> None:
    """Train and evaluate what is not done yet. Raises RunError when a run fails; what is done stays."""
    for number, run in enumerate(runs, 1):
        where = f"run {number} of {len(runs)}: {run.name}"
        if position(run.plan).finished:
            console.print(f"{where}: done", markup=False)
        else:
            console.print(f"{where}: training", markup=False)
            _call(_train(config, run), where, run.recipe.run_path / "train.log")
        if config.eval is not None:
            _call(_evaluate(config.eval, run), f"{where}: evaluation", run.recipe.run_path / "eval.log")


def submit(runs: list[Run], nodes: int, console: Console) -> None:
    """Every run that is not done as a job of its own; each requeues itself."""
    from megatron_smol.slurm.submit import Shape
    from megatron_smol.slurm.submit import submit as submit_run

    for run in runs:
        if position(run.plan).finished:
            console.print(f"{run.name}: done", markup=False)
        else:
            console.print(f"{run.name}: job {submit_run(run.recipe, Shape(nodes))}", markup=False)


def recipe_file(config: Ablation, run: Run) -> Path:
    """Where the recipe of a run is written."""
    path = config.output / "recipes" / f"{run.recipe.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, dump_recipe(run.recipe))
    return path


def _train(config: Ablation, run: Run) -> list[str]:
    command = ["-m", "megatron_smol", "train", str(recipe_file(config, run))]
    if config.ranks:
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(config.ranks),
            *command,
        ]
    return [sys.executable, *command]


def _evaluate(asked: Evaluation, run: Run) -> list[str]:
    """`smol eval` itself leaves out what evals.jsonl already has."""
    command = [
        sys.executable,
        "-m",
        "megatron_smol",
        "eval",
        str(run.recipe.run_path),
        "--tasks",
        ",".join(asked.tasks),
    ]
    command += ["--data-dir", str(asked.data_dir)] if asked.data_dir else []
    return command + (["--limit", str(asked.limit)] if asked.limit else [])


def _call(command: list[str], what: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code == EXIT_RESTART_ME:
        raise RunError(f"{what} was stopped by a signal and has saved itself; the same command goes on")
    if code:
        last = log.read_text().strip().splitlines()[-1:]
        raise RunError(
            f"{what} failed with exit code {code}: {' '.join(last)} (all of it: {log}); the same command goes on"
        )
