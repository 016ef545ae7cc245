"""A curation under Slurm gives what it gives on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.curate.test_pipeline import configure, content, raw, run
from tests.slurm.conftest import User
from tests.tiny import environment, smol

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
__all__ = ["raw"]


def test_the_same_output_as_on_one_machine(user: User, tmp_path: Path, raw: Path) -> None:
    steps = ["gopher_quality", "minhash", "clean", "exact"]
    assert run(configure(tmp_path, raw, *steps), "--output", tmp_path / "here").returncode == 0
    config = configure(
        tmp_path, raw, *steps, slurm={"partition": "batch", "time": "00:10:00", "mem_per_cpu_gb": 1}
    )
    path = f"{Path(sys.executable).parent}:{user.cluster.environment()['PATH']}"
    env = environment() | user.cluster.environment(
        PATH=path, PYTHONPATH=os.environ.get("PYTHONPATH", str(Path.cwd()))
    )
    done = subprocess.run(smol("curate", config), env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    user.until(
        lambda: (tmp_path / "out/card.html").is_file() or not user.cluster.run("squeue", "-h"),
        "end of the chain",
        300,
    )
    logs = "".join(p.read_text() for p in (tmp_path / "out/work").rglob("slurm_logs/*.out"))
    assert (tmp_path / "out/card.html").is_file(), logs[-3000:]
    assert content(tmp_path / "out") == content(tmp_path / "here")
