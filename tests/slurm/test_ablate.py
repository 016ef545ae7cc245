"""An ablation as one Slurm array: every element is a run that saves, requeues and continues itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.slurm.conftest import User
from tests.tiny import TinyRun, rows, smol

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
STEPS = 150


def test_an_array_of_runs_with_one_sent_away_in_the_middle(user: User, tmp_path: Path) -> None:
    settings = {"SMOL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env = user.cluster.environment(**settings) | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def ablate(*more: object) -> subprocess.CompletedProcess[str]:
        command = smol("ablate", "ablation.yaml", *more)
        return subprocess.run(command, env=env, cwd=user.folder, capture_output=True, text=True)

    (user.folder / "ablation.yaml").write_text(
        yaml.safe_dump(
            {"name": "array", "base": "examples/tiny.yaml", "output": "out", "budget": f"{STEPS} steps",
             "candidates": {"maths": {"maths": 1}, "code": {"code": 1}}, "seeds": [0, 1], "rank_by": "loss:mean",
             "overrides": ["data.over_epochs=warn"]}
        )
    )  # fmt: skip
    shape = ("--nodes", 1, "--gpus-per-node", 1, "--cpus-per-task", 1, "--time", "10")
    done = ablate("--submit", *shape)
    assert done.returncode == 0, done.stderr + done.stdout
    first = user.folder / "out/maths/seed-0"
    user.until(lambda: (first / "metrics.jsonl").is_file(), "first step of the first run")
    user.cluster.usr1(json.loads((first / "slurm/submissions.jsonl").read_text())["job"])
    user.until(lambda: not user.cluster.run("squeue", "-h"), "end of the array")
    runs = [TinyRun(tmp_path, tmp_path, folder) for folder in sorted((user.folder / "out").glob("*/seed-*"))]
    assert len(runs) == 4
    for run in runs:
        assert [row["step"] for row in rows(run.folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [row["code"] for row in rows(first / "legs.jsonl") if row["event"] == "end"] == [75, 0]
    assert "every run is done" in ablate("--submit", *shape).stdout
    table = ablate("--json")
    assert table.returncode == 0, table.stderr
    assert set(json.loads(table.stdout)["arms"]) >= {"maths", "code"}, table.stdout
