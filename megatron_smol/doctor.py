"""`smol doctor`: what this machine offers, what is installed, and what would be in the way."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, metadata, version

from rich.console import Console
from rich.table import Table

from megatron_smol.model.backend import MEGATRON_CORE, have_transformer_engine

Finding = tuple[str, str, bool]  # what, what was found, whether it is as it should be


def examine() -> list[Finding]:
    """Everything worth knowing before a run; the last field is False where something has to be done."""
    return [_python(), _megatron_core(), _extension(), *_devices(), _apex(), _disk()]


def print_findings() -> bool:
    """Print a table; True when nothing stands in the way."""
    table = Table("what", "found", "", box=None)
    findings = examine()
    for what, found, good in findings:
        table.add_row(what, found, "ok" if good else "[red]mend this[/]")
    Console(soft_wrap=True).print(table)
    return all(good for _, _, good in findings)


def _python() -> Finding:
    return "Python", sys.version.split()[0], sys.version_info >= (3, 11)


def _megatron_core() -> Finding:
    found = _version("megatron-core")
    wanted = "" if found == MEGATRON_CORE else f"; pip install megatron-core=={MEGATRON_CORE}"
    return "megatron-core", found + wanted, not wanted


def _extension() -> Finding:
    built = importlib.util.find_spec("megatron_smol._csrc") is not None
    return "C++ data order", "built" if built else "not built: make install", built


def _devices() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    rows = [("torch", torch.__version__, True), ("CPU", f"{cores} cores; gloo, fp32 and bf16", True)]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none: training runs on the CPU", True)]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        rows.append(
            (f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}", True)
        )
    te = have_transformer_engine()
    advice = (
        f"{_version('transformer-engine')}: FP8, fused layers"
        if te
        else "missing: bf16 by PyTorch layers, no FP8"
    )
    return [*rows, ("Transformer Engine", advice, True)]


def _apex() -> Finding:
    """PyPI's `apex` is not NVIDIA's, and its presence flips megatron-core's HAVE_APEX."""
    try:
        summary = metadata("apex")
    except PackageNotFoundError:
        return "Apex", "not installed (not needed)", True
    nvidia = "nvidia" in str(summary).lower()
    return "Apex", "NVIDIA's" if nvidia else "PyPI's apex is not NVIDIA's: pip uninstall apex", nvidia


def _disk() -> Finding:
    return "free disk here", f"{shutil.disk_usage('.').free / 1e9:,.0f} GB", True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
