"""`smol status` from files alone: a real run's, and a long log."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.errors import UserError
from megatron_smol.slurm import status as module
from megatron_smol.slurm.legs import append_row
from megatron_smol.slurm.status import status
from tests.tiny import TinyRun

TOKENS_PER_STEP = 1000


def write_run(run: Path, rows: int, steps: int, seconds: float = 0.5) -> None:
    """A run folder in the trainer's format: two stages, `rows` steps logged."""
    half = steps // 2
    stages: list[dict[str, Any]] = [
        {"name": name, "start_step": start, "end_step": start + half, "steps": half}
        | {"tokens": half * TOKENS_PER_STEP, "tokens_per_step": TOKENS_PER_STEP}
        for name, start in (("one", 0), ("two", half))
    ]
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps({"run": {"steps": steps}, "stages": stages}))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            index = int(step > half)
            row = {
                "stage": stages[index]["name"],
                "stage_index": index,
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
            }
            file.write(
                json.dumps(row | {"seconds": seconds, "tokens_per_s": TOKENS_PER_STEP / seconds}) + "\n"
            )


def test_a_finished_run(tiny: TinyRun) -> None:
    assert tiny.train(ranks=0).returncode == 0
    found = status(tiny.run)
    assert (found.state, found.progress, found.eta_seconds) == ("finished", 1.0, 0.0)
    assert (found.stage, found.step, found.checkpoint) == ("long", 13, "long-00000013")
    assert found.steps_done == found.steps_total == 19, "branches count"
    assert found.tokens_per_second and found.last_incident is None


def test_a_run_that_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, rows=300, steps=1000)
    found = status(run)
    assert (found.state, found.steps_done, found.progress) == ("training", 300, 0.3)
    assert found.tokens_per_second == 2000
    assert found.eta_seconds == 700 * TOKENS_PER_STEP / 2000
    (run / "stop").touch()
    assert status(run).state == "stopping"
    long_ago = time.time() - 3600
    os.utime(run / "metrics.jsonl", (long_ago, long_ago))
    assert status(run).state == "stopped"


def test_restarts_goodput_and_incidents(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, rows=300, steps=1000)
    now = time.time()
    for restart in range(3):
        append_row(
            run / "legs.jsonl", {"at": now - 600 + restart, "event": "start", "job": "5", "restart": restart}
        )
    append_row(run / "legs.jsonl", {"at": now - 9, "event": "end", "action": "restart", "reason": "killed"})
    found = status(run)
    assert (found.restarts, found.job, found.last_incident) == (2, "5", "killed")
    assert found.goodput == pytest.approx(300 * 0.5 / 600, rel=0.02)
    append_row(run / "incidents.jsonl", {"reason": "loss spike at step 290"})
    assert status(run).last_incident == "loss spike at step 290"


def test_reads_a_bounded_part_of_a_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of 200,000 steps (30 MB): the same answers, from less than a megabyte of it."""
    run = tmp_path / "run"
    write_run(run, rows=200_000, steps=400_000)
    append_row(
        run / "legs.jsonl",
        {"at": (run / "metrics.jsonl").stat().st_mtime - 200_000, "event": "start", "job": "5"},
    )
    read = 0

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, *size: int) -> bytes:
            nonlocal read
            data: bytes = self.file.read(*size)
            read += len(data)
            return data

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *a, **k: (
            Counting(real(path, *a, **k)) if "metrics" in path.name else real(path, *a, **k)
        ),
    )
    found = status(run)
    assert (found.steps_done, found.tokens_per_second) == (200_000, 2000)
    assert found.goodput == pytest.approx(0.5, rel=0.01)
    assert 0 < read < 1 << 20


@pytest.mark.parametrize(
    ("plan", "says"), [(None, "holds no run"), ("{", "cannot be read"), ("[]", "cannot be read")]
)
def test_what_is_no_run(tmp_path: Path, plan: str | None, says: str) -> None:
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(UserError, match=says):
        status(tmp_path)
    assert module.SAMPLES * module.SAMPLE_BYTES < 1 << 20
