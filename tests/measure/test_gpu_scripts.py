"""The measurements for a GPU machine, as far as a CPU can take them: the same code with a tiny model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import convert
from bench.common import Seconds
from bench.gpu.loss_gap import gap
from tests.tiny import environment

ROOT = Path(__file__).parents[2]


def step(number: int, out: Path) -> list[dict[str, Any]]:
    """Rows of a dry run."""
    import sys

    command = ["bash", str(ROOT / "bench/gpu/run.sh"), str(number), "--dry-run"]
    settings = environment(OUT=str(out), PYTHON=sys.executable)
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_grid_measures_every_row(tmp_path: Path) -> None:
    rows = step(1, tmp_path)
    assert [row["row"] for row in rows] == [
        f"bf16 {s} x {t // s}" for s in (2048, 8192) for t in (8192, 16384, 32768)
    ]
    assert all(row["dry_run"] and row["tokens_per_second_per_gpu"]["median"] > 0 for row in rows)


def test_loss_curves_are_compared(tmp_path: Path) -> None:
    rows = step(4, tmp_path)
    assert [row["seed"] for row in rows] == [42, 43] and len(rows[0]["losses"]) == 4
    assert rows[0]["losses"] != rows[1]["losses"]
    assert "1.00 x the seeds' gap" in (tmp_path / "loss-gap.txt").read_text()


def test_the_gap_is_of_the_last_third() -> None:
    assert gap([9, 9, 9, 9, 2, 2], [0, 0, 0, 0, 2.5, 2.5]) == 0.5


@pytest.mark.parametrize("arguments", [["9"], []])
def test_a_step_that_does_not_exist(arguments: list[str], tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench/gpu/run.sh"), *arguments, *(["--dry-run"] if arguments else [])]
    done = subprocess.run(command, env=environment(OUT=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode != 0 and ("none of 0" in done.stderr or "usage:" in done.stderr)


def test_the_law_of_conversion_is_about_wall_time() -> None:
    """Ours took 1 and 9 seconds: 5 in the middle, where the middle of the rates would say 1.8."""
    assert convert._median_wall([Seconds(1.0, 0.1), Seconds(9.0, 0.1)]) == 5.0
    assert convert.TURNS >= 4
