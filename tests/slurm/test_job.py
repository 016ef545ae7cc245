"""The shipped batch script under a real Slurm: run, signal, requeue, finish; nothing lost, nothing done twice."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import INSIDE, LAST, LONG, User, assert_nothing_lost
from tests.tiny import TinyRun, rows, write_recipe
from tests.train.test_run import weights_of

pytestmark = pytest.mark.slurm


def test_signal_requeue_finish_and_a_leg_too_many(user: User, whole: TinyRun) -> None:
    """USR1 saves, the job requeues itself and finishes bit-equal; one more job leaves the finished run alone."""
    job = user.submit(overrides=LONG, PREFLIGHT="1", ALERT=f"cat >> {user.folder}/alerts")
    user.until_line(15)
    user.cluster.usr1(job)
    user.until_logged(job, "requeued; the same job goes on")
    assert user.cluster.wait(job)["JobState"] == "COMPLETED", user.log(job)[-3000:]
    assert_nothing_lost(user, whole)
    legs = user.legs()
    assert [(leg["code"], leg["action"]) for leg in legs] == [(75, "restart"), (0, "done")]
    assert legs[0]["progress"][1] >= 15, "saved where the signal came, not at an earlier interval"
    log = user.log(job)
    assert "restart 0, nodes" in log and "restart 1, nodes" in log, "one log for both legs"
    assert "preflight: training on node" in log
    alerts = [json.loads(line) for line in (user.folder / "alerts").read_text().splitlines()]
    assert [alert["event"] for alert in alerts] == ["restart", "done"]
    assert f"tiny, job {job}: restart: training asked for a restart" in alerts[0]["message"]
    assert (user.run / f"slurm/{job}.done").is_file()

    before = {p: p.stat().st_mtime_ns for p in (user.run / "checkpoints").rglob("*")}
    again = user.submit(overrides=LONG)
    assert user.cluster.wait(again, seconds=60)["JobState"] == "COMPLETED"
    assert (user.run / f"slurm/{again}.done").is_file()
    assert {p: p.stat().st_mtime_ns for p in (user.run / "checkpoints").rglob("*")} == before


def test_what_would_fail_again_is_not_tried_again(user: User) -> None:
    """A recipe that does not plan, and data that are not there: the exit code says which, nothing is requeued."""
    wrong = user.submit(overrides="lr.peek=1")
    job = user.cluster.wait(wrong)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert "lr.peek" in user.log(wrong)
    gone = user.submit(overrides=f"sources.web.tokens=1M sources.web.path={user.folder}/nowhere")
    job = user.cluster.wait(gone)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0"), user.log(gone)
    assert "nowhere" in user.log(gone) and "the data must be mended first" in user.log(gone)
    assert job["Restarts"] == "0"


@pytest.mark.faults
def test_three_legs_on_two_nodes_of_two_tasks(user: User, whole_on_four: TinyRun) -> None:
    job = user.submit("--ntasks-per-node=2", overrides=LONG, PREFLIGHT="1")
    for line in (15, 50):
        user.until_line(line)
        user.cluster.usr1(job)
        user.until_logged(job, "requeued; the same job goes on", 1 + (line > 15))
    assert user.cluster.wait(job)["JobState"] == "COMPLETED", user.log(job)[-3000:]
    assert [leg["action"] for leg in user.legs()] == ["restart", "restart", "done"]
    log = user.log(job)
    assert [log.count(f"restart {leg}, nodes") for leg in range(3)] == [1, 1, 1], "one log for all legs"
    assert log.count("resumed from ") == 2
    assert_nothing_lost(user, whole_on_four)


@pytest.mark.faults
@pytest.mark.parametrize(
    "asked",
    [
        ["--time=2", "--signal=USR1@30"],
        ["--time=1", "--signal=CONT@1"],
        ["--time=2", "--signal=USR1@30", "--nodes=3", "--no-kill"],
    ],
    ids=["a signal before", "none that ranks hear", "with a spare"],
)
def test_time_limit(
    user: User, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, asked: list[str]
) -> None:
    """A limit of a minute or two: each leg goes on from the save of the one before, and the last ends equal to one run without
    limits. Steps wait, so that not their speed decides how many legs there are."""
    overrides = "stages.two.until='800 steps' save.every='1000 steps'"
    folder = tmp_path_factory.mktemp("unlimited")
    unlimited = TinyRun(write_recipe(tiny_data, folder), tiny_data, folder)
    spares = "1" if "--no-kill" in asked else "0"
    pace = user.folder / "pace"
    pace.write_text("0.25")
    inside = {"PYTHONPATH": INSIDE, "TEST_PACE": str(pace)}
    job = user.submit(*asked, overrides=overrides, SPARES=spares, **inside)
    assert user.cluster.wait(job, seconds=1800)["JobState"] == "COMPLETED", user.log(job)[-3000:]
    legs, starts = user.legs(), user.legs("start")
    assert [leg["action"] for leg in legs] == ["restart"] * (len(legs) - 1) + ["done"] and len(legs) >= 3, (
        legs
    )
    assert all(leg["attempt"] == 0 for leg in legs), "a spare does not help against the limit"
    assert [leg["progress"] for leg in legs[:-1]] == [leg["progress"] for leg in starts[1:]]
    assert unlimited.train(*shlex.split(overrides), ranks=2).returncode == 0
    assert rows(user.run / "metrics.jsonl") == rows(unlimited.run / "metrics.jsonl")
    assert weights_of(user.run, "long-00000801") == weights_of(unlimited.run, "long-00000801")


@pytest.mark.faults
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5, 4.0, 6.0])
def test_signal_before_the_first_step_twice(user: User, whole: TinyRun, seconds: float) -> None:
    """During the imports and while the ranks meet, two signals within a second: no lost run, no endless one."""
    job = user.submit(overrides=LONG)
    user.until_logged(job, "preflight: training on")
    time.sleep(seconds)
    for _ in range(2):
        user.cluster.usr1(job)
        time.sleep(0.5)
    assert user.cluster.wait(job)["JobState"] == "COMPLETED", user.log(job)[-3000:]
    assert_nothing_lost(user, whole)
    assert user.legs()[0]["code"] == 75, user.legs()[0]


@pytest.mark.faults
def test_array_as_a_chain(user: User, whole: TinyRun) -> None:
    """--array=1-5%1: element 2 finishes the run, elements 3 to 5 leave it alone in seconds."""
    job = user.submit("--array=1-5%1", overrides=LONG)
    user.until_line(15)
    # An id of its own; by the array's, scancel tries the waiting ones too.
    user.cluster.usr1(user.legs("start")[0]["job"])
    user.until(lambda: not user.cluster.run("squeue", "-h", "-j", job), "end of the chain")
    assert_nothing_lost(user, whole)
    assert [leg["action"] for leg in user.legs()] == ["restart", "done"]
    assert len(list((user.run / "slurm").glob("*.done"))) == 4
    elements = user.cluster.run("scontrol", "show", "job", job).split("\n\n")
    took = {re.search(r"ArrayTaskId=(\d)", one)[1]: re.search(r"RunTime=(\S+)", one)[1] for one in elements}  # type: ignore[index]
    assert all(took[number] < "00:00:15" for number in "345"), took


@pytest.mark.faults
def test_chain_of_jobs(user: User, whole: TinyRun) -> None:
    """afterany: the second job has nothing left to do and says so at once."""
    first = user.submit(overrides=LONG)
    second = user.submit(f"--dependency=afterany:{first}", overrides=LONG)
    assert user.cluster.wait(first)["JobState"] == "COMPLETED"
    assert user.cluster.wait(second, seconds=60)["JobState"] == "COMPLETED"
    assert f"from {LAST}" in user.log(second)
    assert_nothing_lost(user, whole)
