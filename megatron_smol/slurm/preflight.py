"""Before a leg trains: is every node fit for it? A bad one is named, and left out if there is a spare.

`srun` starts this file on every node (`python -m megatron_smol.slurm.preflight FOLDER RECIPE [a.b=c]`). It looks
at the node (GPUs, driver, libraries, disk, the recipe's data), writes what it saw to FOLDER/NODE.json, then sums one
number over all ranks. `leg` reads the files: a node without one did not answer.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_smol.checkpoint.folder import list_checkpoints, unfinished_bytes
from megatron_smol.data.files import write_whole
from megatron_smol.data.source import load_source
from megatron_smol.device import on_gpu
from megatron_smol.errors import DiskError, UserError, leave
from megatron_smol.recipe import estimate
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.schema import Recipe

# Ledgers, logs and process groups do not depend on clocks; people who read logs of 32 nodes do.
MAX_SKEW_SECONDS = 5.0
# What a driver itself holds on an idle GPU is a few hundred MiB; more is a process that outlived its job.
MAX_IDLE_GPU_MIB = 2048
GROUP_TIMEOUT_SECONDS = 60
GPU_FIELDS = ("name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total")
MUST_MATCH = ("python", "megatron-smol", "torch", "driver", "sources")


@dataclass
class Verdict:
    """Fit nodes in the order given, and why each of the others is not."""

    fit: list[str]
    unfit: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def judge(nodes: Sequence[str], found: dict[str, dict[str, Any]]) -> Verdict:
    """Compare what the nodes saw. found: NODE.json by node; one that differs from most is the odd one."""
    verdict = Verdict([])
    usual = {key: _most_common([row["facts"].get(key) for row in found.values()]) for key in MUST_MATCH}
    clock = sorted(row["clock"] for row in found.values() if row.get("clock"))
    middle = clock[len(clock) // 2] if clock else 0.0
    for node in nodes:
        row = found.get(node)
        if row is None:
            verdict.unfit[node] = "did not answer"
            continue
        wrong = list(row["wrong"])
        for key, value in usual.items():
            if (mine := row["facts"].get(key)) != value:
                wrong.append(f"{key} is {mine}, on other nodes {value}")
        if row.get("clock") and abs(row["clock"] - middle) > MAX_SKEW_SECONDS:
            wrong.append(f"its clock is {row['clock'] - middle:+.1f} s off; mend its time service")
        if wrong:
            verdict.unfit[node] = "; ".join(wrong)
        else:
            verdict.fit.append(node)
    silent = [node for node in verdict.fit if found[node].get("group") != "ok"]
    if (
        silent and not verdict.unfit
    ):  # all look well alone and cannot talk: the network, and nobody to single out
        verdict.notes.append(
            f"the all-reduce over all ranks failed on {silent[0]}: {found[silent[0]].get('group')}"
        )
    return verdict


def _most_common(values: list[Any]) -> Any:
    return max(values, key=values.count) if values else None


def look(recipe: Recipe) -> dict[str, Any]:
    """What this node offers: facts to compare, and what is wrong by itself."""
    wrong: list[str] = []
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        **{name: _version(name) for name in ("megatron-smol", "torch", "transformer-engine")},
    }
    _look_at_gpus(facts, wrong)
    _look_at_disk(recipe, facts, wrong)
    facts["sources"] = _look_at_sources(recipe, wrong)
    return {"facts": facts, "wrong": wrong}


def _look_at_gpus(facts: dict[str, Any], wrong: list[str]) -> None:
    """All GPUs that Slurm gave, idle and without memory errors; nothing where the CPU was asked for."""
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if os.environ.get("SMOL_DEVICE") == "cpu" or not promised:
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        wrong.append(f"nvidia-smi gave no answer ({type(error).__name__})")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode or len(rows) < promised:
        wrong.append(f"{len(rows)} of {promised} GPUs are visible ({' '.join(done.stderr.split())[:200]})")
    for index, (_, driver, used_mib, errors) in enumerate(row for row in rows if len(row) == len(GPU_FIELDS)):
        facts["driver"] = driver
        if used_mib.isdigit() and int(used_mib) > MAX_IDLE_GPU_MIB:
            wrong.append(f"GPU {index} has {used_mib} MiB in use by another process")
        if errors.isdigit() and int(errors):
            wrong.append(f"GPU {index} has {errors} uncorrected memory errors; reset or replace it")


def room_needed(recipe: Recipe) -> int:
    """Bytes that must be free where the run writes: two checkpoints, or one if it holds save.keep_last already.

    What a killed save left there counts as free: training clears it before it writes another.
    """
    precisions = {recipe.training_of(stage).precision for stage in recipe.stages}
    largest = max(estimate.checkpoint_bytes(recipe.model, precision) for precision in precisions)
    checkpoints = recipe.run_path / "checkpoints"
    more = 1 if len(list_checkpoints(checkpoints)) >= recipe.save.keep_last else 2
    return max(more * largest - unfinished_bytes(checkpoints), 0)


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that need not be there yet. (On a node where the run folder is not mounted it must not be made.)"""
    try:
        return shutil.disk_usage(folder).free
    except FileNotFoundError:
        return free_bytes(folder.absolute().parent)


def _look_at_disk(recipe: Recipe, facts: dict[str, Any], wrong: list[str]) -> None:
    """Room where the run writes, and a little where libraries put their caches."""
    places: dict[Path, Callable[[], int]] = {
        recipe.run_path: lambda: room_needed(recipe),
        Path(os.environ.get("TMPDIR", "/tmp")): lambda: 10**8,
    }
    for folder, asked in places.items():
        try:
            free, needed = free_bytes(folder), asked()
        except (OSError, DiskError) as error:
            wrong.append(f"{folder}: {error}")
            continue
        facts[f"free bytes in {folder}"] = free
        if free < needed:
            wrong.append(f"{folder} has {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB are needed")


def _look_at_sources(recipe: Recipe, wrong: list[str]) -> str:
    """Opens every source, which compares its files' sizes with the manifest; what they are, to compare."""
    seen = []
    for name, source in recipe.sources.items():
        try:
            identity = load_source(source.path).identity
            seen.append(f"{name}:{identity['tokens']}:{str(identity['sha256'])[:12]}")
        except (UserError, OSError) as error:
            wrong.append(str(error))
    return " ".join(seen)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def sum_over_ranks() -> tuple[str, float]:
    """One all-reduce over the whole step, and this node's clock at that moment: ("ok" or why not, seconds)."""
    import torch

    rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    has_gpu = on_gpu()
    device = torch.device("cuda", int(os.environ["SLURM_LOCALID"])) if has_gpu else torch.device("cpu")
    try:
        if has_gpu:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "nccl" if has_gpu else "gloo",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=GROUP_TIMEOUT_SECONDS),
        )
        value = torch.full((1 << 20,), float(rank + 1), device=device)
        torch.distributed.all_reduce(value)
        found, clock = float(value[-1]), time.time()
        expected = ranks * (ranks + 1) / 2
        return ("ok" if found == expected else f"the sum is {found}, not {expected}"), clock
    except Exception as error:
        words, _, _ = str(error).partition("\n")
        return f"{type(error).__name__}: {words[:200]}", 0.0


def main() -> None:
    """On a node: look, tell, take part in the sum, tell."""
    folder, recipe = Path(sys.argv[1]), load_recipe(sys.argv[2], sys.argv[3:])
    mine = os.environ["SLURM_LOCALID"] == "0"
    report = folder / f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}.json"
    seen: dict[str, Any] = look(recipe) if mine else {}
    try:
        if mine:
            _tell(report, seen)
        seen["group"], seen["clock"] = sum_over_ranks()
        if mine:
            _tell(report, seen)
    except DiskError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(error.exit_code)
    leave(0)


def _tell(report: Path, seen: dict[str, Any]) -> None:
    write_whole(report, json.dumps(seen, indent=1) + "\n")


if __name__ == "__main__":
    main()
