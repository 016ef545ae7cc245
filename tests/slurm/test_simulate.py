"""How often to save: the drawn failures agree with the published formulas."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_smol.errors import UserError
from megatron_smol.slurm.simulate import (
    Costs,
    daly,
    expected_goodput,
    hours,
    measured_rates,
    simulate,
    table,
    young,
)
from tests.tiny import environment, smol

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize(
    ("save", "back", "factor"), itertools.product((1.0, 60.0), (0.0, 600.0), (0.3, 1.0, 3.0))
)
def test_drawn_failures_agree_with_the_formula(save: float, back: float, factor: float) -> None:
    costs = Costs(20000.0, save, back)
    row = simulate(costs, daly(costs) * factor, seed=1)
    assert abs(row.simulated - row.expected) < 5 * row.standard_error + 1e-4
    # Half an interval where a failure hits work, all of it where it hits a save.
    lost = row.interval * (row.interval / 2 + save) / (row.interval + save)
    assert row.lost_per_failure == pytest.approx(lost, rel=0.1)


def test_what_hardly_ever_gets_anywhere_has_a_goodput_of_nothing() -> None:
    assert expected_goodput(Costs(mtbf=100, save=5, back=90000), 30.0) == 0.0
    assert expected_goodput(Costs(mtbf=100, save=90000, back=0), 30.0) == 0.0
    assert table(Costs(mtbf=100, save=5, back=90000), seed=0)[0][0].expected == 0.0


def test_the_best_interval() -> None:
    costs = Costs(20000.0, 60.0, 300.0)
    assert young(costs) == pytest.approx(math.sqrt(2 * 60 * 20000))
    best = expected_goodput(costs, daly(costs))
    assert all(expected_goodput(costs, daly(costs) * factor) < best for factor in (0.8, 1.25))
    for share in (0.01, 0.05, 0.2):  # of the mean time between interruptions that a save takes
        hard = Costs(20000.0, 20000.0 * share, 0.0)
        true = max(np.geomspace(100, 40000, 4000), key=lambda interval: expected_goodput(hard, interval))
        assert daly(hard) == pytest.approx(true, rel=0.01)
    rows, optimum = table(costs, seed=0)
    assert optimum == pytest.approx(daly(costs), rel=0.3)
    assert max(rows, key=lambda row: row.simulated).interval == pytest.approx(daly(costs), rel=0.45)
    assert table(costs, seed=0) == table(costs, seed=0)


@pytest.mark.parametrize(
    ("text", "expected"), [("50000h", 50000), ("30d", 720), ("90m", 1.5), ("1,800s", 0.5), ("7", 7)]
)
def test_times(text: str, expected: float) -> None:
    assert hours(text) == expected


@pytest.mark.parametrize("text", ["", "h", "-3h", "0h", "soon", "nan", "inf"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UserError, match="write 50000h"):
        hours(text)


def test_measured_rates(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"
    seconds = {
        what: {"ours_wall_seconds": {"median": value}} for what, value in {"save": 2.0, "load": 0.5}.items()
    }
    path.write_text(json.dumps({"details": {"bytes": {"ours": 100}, **seconds}}))
    assert measured_rates(path) == (50.0, 200.0)
    path.write_text("{}")
    with pytest.raises(UserError, match="--save-seconds"):
        measured_rates(path)


def test_measured_is_over_the_ranks_that_write(tmp_path: Path) -> None:
    """One of each tensor- and pipeline-parallel position, however many GPUs train; what is given wins, a 0 too."""
    seconds = {what: {"ours_wall_seconds": {"median": 10.0}} for what in ("save", "load")}
    measured = tmp_path / "checkpoint.json"
    measured.write_text(json.dumps({"details": {"bytes": {"ours": 10e9}, **seconds}}))

    def told(*more: object) -> subprocess.CompletedProcess[str]:
        command = smol(
            "simulate", EXAMPLES / "smollm2_1.7b.yaml", "--start-seconds", 100, "--measured", measured, *more
        )
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    size = 23.959269376  # GB, of this recipe
    found = json.loads(told("--json").stdout)
    assert found["seconds"]["save"] == pytest.approx(size) and found["seconds"]["back"] == pytest.approx(
        100 + size
    )
    found = json.loads(told("--json", "--load-seconds", 0, "parallel.tp=2", "parallel.pp=2").stdout)
    assert found["seconds"]["save"] == pytest.approx(size / 4) and found["seconds"]["back"] == 100
    text = told().stdout
    assert "a save over 1 writing ranks" in text and "(the plan's speed, modelled for H100)" in text


def test_the_command() -> None:
    arguments = ("--gpus", 256, "--mtbf", "50000h", "--save-seconds", 10, "--load-seconds", 20, "--json")
    command = smol("simulate", EXAMPLES / "smollm2_1.7b.yaml", *arguments)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds"] == {"mtbf": 50000 * 3600 / 256, "save": 10.0, "back": 320.0}
    assert 0.99 < found["goodput_at_best"]["daly"] < 1
