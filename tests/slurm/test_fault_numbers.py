"""Numbers that go wrong in a job under Slurm: not applied, or rolled back and skipped; the ledger says what was read."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import INSIDE, LAST, LONG, User
from tests.slurm.table import FaultTable, Trial
from tests.tiny import TinyRun, rows, write_recipe
from tests.train.faulty import Fault
from tests.train.test_run import weights_of

pytestmark = [pytest.mark.slurm, pytest.mark.faults]


def test_not_a_number(user: User, tiny_data: Path, tmp_path: Path, table: FaultTable) -> None:
    """In gradients, the loss and activations of either rank: read, not applied, and the run goes on."""
    faults = [
        Fault("gradient", "two", 10, rank=1),
        Fault("gradient", "two", 25, rank=0, value=math.inf),
        Fault("loss", "two", 40, rank=0),
        Fault("activation", "two", 65, rank=1),
        Fault("gradient", "long", 80, rank=1, value=-math.inf),
    ]
    log = finished(user, f"{LONG} guard.non_finite=skip", faults)
    found = decided(user.run)
    assert [(row["stage"], row["step"], row["decision"]) for row in found] == [
        (fault.stage, fault.step, "skip") for fault in faults
    ]
    assert [row["gradients"][0]["rank"] for row in found] == [fault.rank for fault in faults]
    assert all(row["documents"] for row in found)
    assert "loss nan" in log and "gradient norm inf" in log and len(user.legs()) == 1
    skipped = {"two": [[10, 10], [25, 25], [40, 40], [65, 65]], "long": [[80, 80]]}
    require_equal(user, skipping(tiny_data, tmp_path, skipped))
    table.add(
        "NaN or Inf put into a gradient, the loss, an activation",
        "`!! step ... of 'two': gradient norm nan ...`, rank, parameters, documents",
        "equal to the run whose recipe skips these steps, ledger exact; same leg",
        [Trial(0, None, 0) for _ in faults],
    )


def test_a_spike(user: User, tiny_data: Path, tmp_path: Path, table: FaultTable) -> None:
    """A gradient 10,000 times too large on one rank: back to the checkpoint before, and a window of data is left out."""
    settings = f"{LONG} guard.spike=rollback guard.history=8 guard.skip_before=1 guard.skip_after=1"
    log = finished(user, settings, [Fault("scale", "two", 50, value=1e4, once=True)])
    (row,) = decided(user.run)
    assert (row["step"], row["decision"], row["to"]) == (50, "rollback", "two-00000040")
    assert "gradient norm spike" in log and "back at" in log and len(user.legs()) == 1
    require_equal(user, skipping(tiny_data, tmp_path, {"two": [[49, 51]]}))
    table.add(
        "a loss spike (a gradient 10,000 times too large)",
        "`!! step 50 of 'two': gradient norm spike ...: rolled back to ...`",
        "equal to the run whose recipe skips the window, ledger exact; same leg",
        [Trial(0, None, 50 - 40)],
    )


def finished(user: User, overrides: str, faults: list[Fault]) -> str:
    planted = json.dumps([asdict(fault) for fault in faults])
    job = user.submit(overrides=overrides, PYTHONPATH=INSIDE, TEST_FAULTS=planted)
    assert user.cluster.wait(job)["JobState"] == "COMPLETED", user.log(job)[-3000:]
    return user.log(job)


def decided(run: Path) -> list[dict[str, Any]]:
    """Without notes: of stragglers on a busy machine, of the uneven gradients of so small a model."""
    return [row for row in rows(run / "incidents.jsonl") if row["decision"] != "note"]


def skipping(data: Path, folder: Path, steps: dict[str, list[list[int]]]) -> TinyRun:
    """The run without faults, whose recipe leaves these steps out."""
    folder = folder / "skipping"
    folder.mkdir()
    run = TinyRun(write_recipe(data, folder), data, folder)
    done = run.train(*shlex.split(LONG), f"guard.skip_steps={json.dumps(steps)}", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def require_equal(user: User, other: TinyRun) -> None:
    """Weights, moments, ledger, and all numbers of the steps that were applied."""
    assert weights_of(user.run, LAST) == weights_of(other.run, LAST)
    assert (user.run / "ledger.json").read_text() == (other.run / "ledger.json").read_text()
    assert applied(user.run) == applied(other.run)


def applied(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run / "metrics.jsonl") if row.get("applied", True)]
