"""Hours of faults, one every 60 to 120 s, done to one job that nobody touches: `make punisher`.

Then it is left in peace and goes to its end, which must be that of a run that nothing happened to. PUNISH_SECONDS is how
long it is punished (default: three minutes, as a trial). PUNISH_FOLDER keeps journal, log and run; with PUNISH_RESULT
the account is written there.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
from pathlib import Path

import pytest

from tests.slurm.conftest import INSIDE, User, assert_nothing_lost
from tests.slurm.punisher import Punisher
from tests.tiny import TinyRun, write_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.faults]

SECONDS = float(os.environ.get("PUNISH_SECONDS", 180))
SEED = int(os.environ.get("PUNISH_SEED", 1))
PACE = 0.25  # seconds a step waits
STEPS = round(SECONDS * 2.5)  # more than are trained while it is punished
# The learning rate falls to the very end, so that every step moves the weights.
OVERRIDES = (
    f"stages.two.until='{STEPS} steps' save.every='20 steps' eval.windows_per_source=1 "
    f"lr.peak=1e-3 lr.decay_start='{STEPS // 2} steps' lr.decay_end='{STEPS + 2} steps' "
    "guard.step_timeout=15 guard.collective_timeout=30"
)


def test_a_punished_run_ends_as_one_that_nobody_touched(
    user: User, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kept = Path(os.environ.get("PUNISH_FOLDER", user.folder))
    kept.mkdir(parents=True, exist_ok=True)
    user.run = user.cluster.disk / "run"
    pace = user.folder / "pace"
    pace.write_text(f"{PACE}")
    job = user.submit(
        "--time=1440",
        overrides=f"{OVERRIDES} run_dir={user.run}",
        PYTHONPATH=INSIDE,
        TEST_PACE=str(pace),
        PREFLIGHT="1",
        PREFLIGHT_SECONDS="60",
        FUTILE_LEGS="10",  # faults come faster than a leg needs to reach a checkpoint
    )
    punisher = Punisher(user, job, random.Random(SEED), kept / "journal.jsonl")
    try:
        punisher.work(SECONDS)
        account = punisher.account() | {"legs": len(user.legs("start")), "seed": SEED}
        print(json.dumps(account, indent=1))
        pace.write_text("0")
        ended = user.cluster.wait(job, seconds=3600)
        assert ended["JobState"] == "COMPLETED", user.log(job)[-3000:]
        assert_nothing_lost(user, _whole(tiny_data, tmp_path_factory.mktemp("whole")))
    finally:
        (kept / "job.log").write_text(user.log(job))
        shutil.copytree(user.run, kept / "run", dirs_exist_ok=True)
        shutil.rmtree(user.run, ignore_errors=True)
    if path := os.environ.get("PUNISH_RESULT"):
        Path(path).write_text(json.dumps(account, indent=1) + "\n")
    if SECONDS >= 3600:  # a share of a few faults says little
        assert account["effective_of_bound"] >= 0.9, account


def _whole(data: Path, folder: Path) -> TinyRun:
    """The same run, at full speed and left in peace."""
    run = TinyRun(write_recipe(data, folder), data, folder)
    done = run.train(*shlex.split(OVERRIDES), ranks=2, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return run
