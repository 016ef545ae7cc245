"""tools/compare_runs.py: equal, close, different, of another length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[2] / "tools" / "compare_runs.py"


def write(run: Path, *losses: float, **changed: Any) -> Path:
    run.mkdir()
    fixed = {
        "stage": "one",
        "lr": 1e-3,
        "seq_length": 8,
        "global_batch": 2,
        "drawn": {"a": 2},
        "grad_norm": 1.0,
    } | changed
    rows = [fixed | {"step": i + 1, "tokens": 16 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def compare(*arguments: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_equal(tmp_path: Path) -> None:
    code, said = compare(write(tmp_path / "a", 3.0, 2.0), write(tmp_path / "b", 3.0, 2.0))
    assert code == 0 and "equal: 2 steps" in said


def test_close_is_a_choice(tmp_path: Path) -> None:
    runs = write(tmp_path / "a", 3.0, 2.0), write(tmp_path / "b", 3.0, 2.000001)
    assert compare(*runs)[0] == 1
    assert compare(*runs, "--rel", "1e-5")[0] == 0


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    code, said = compare(write(tmp_path / "a", 3.0), write(tmp_path / "b", 3.0, drawn={"b": 2}))
    assert code == 1 and "one step 1: drawn is {'a': 2} and {'b': 2}" in said


def test_another_length(tmp_path: Path) -> None:
    code, said = compare(write(tmp_path / "a", 3.0), write(tmp_path / "b", 3.0, 2.0))
    assert code == 1 and "only" in said and "one step 2" in said


def test_no_run(tmp_path: Path) -> None:
    code, said = compare(tmp_path / "nowhere", tmp_path)
    assert code == 1 and "does not exist" in said and "Traceback" not in said
