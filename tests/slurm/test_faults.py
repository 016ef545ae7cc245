"""What clusters do to a run, done to one under a real Slurm: `pytest -m faults tests/slurm`.

Every run that may end must end bit-equal to the one that nothing happened to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import LONG, User, assert_nothing_lost
from tests.tiny import TinyRun, smol

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
RARE = "stages.two.until='80 steps' save.every='10000 steps'"


def finish(user: User, job: int, whole: TinyRun) -> None:
    ended = user.cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", user.log(job)[-3000:]
    assert_nothing_lost(user, whole)


def test_kill_9_of_a_rank(user: User, whole: TinyRun) -> None:
    job = user.submit(overrides=LONG)
    user.until_line(20)
    os.kill(user.cluster.tasks(2)[0], signal.SIGKILL)
    finish(user, job, whole)
    assert [leg["action"] for leg in user.legs()] == ["restart", "done"]


@pytest.mark.parametrize("node", [1, 2])
def test_power_loss(user: User, whole: TinyRun, node: int) -> None:
    """Of the node that runs the batch script, and of another one; Slurm requeues, the third node is idle."""
    job = user.submit(overrides=LONG)
    user.until_line(20)
    names = user.cluster.run("scontrol", "show", "hostnames", user.cluster.job(job)["NodeList"]).split()
    victim = int(names[node - 1].removeprefix("node"))
    user.cluster.cut_power(victim)
    try:
        finish(user, job, whole)
    finally:
        user.cluster.boot(victim)
        user.until(lambda: user.cluster.idle() == 3, "boot")


def test_lost_node_is_replaced_inside_the_job(user: User, whole: TinyRun) -> None:
    """Three nodes for two, --no-kill: the same leg goes on with the spare, without a place in the queue."""
    job = user.submit(
        "--nodes=3", "--no-kill", overrides=LONG, SPARES="1", PREFLIGHT="1", PREFLIGHT_SECONDS="120"
    )
    user.until_line(20)
    user.cluster.cut_power(2)
    try:
        finish(user, job, whole)
    finally:
        user.cluster.boot(2)
        user.until(lambda: user.cluster.idle() == 3, "boot")
    starts = user.legs("start")
    assert {leg["restart"] for leg in starts} == {0} and starts[-1]["attempt"] >= 1
    assert "node2 is not fit" in user.log(job)
    assert user.legs()[-1]["nodes"] == ["node1", "node3"]


def test_a_node_without_the_data_is_named_and_left_out(user: User, whole: TinyRun) -> None:
    """Its data folder is hidden behind an empty one, as when a file system is not mounted."""
    data = str(whole.data)
    user.cluster.on_node(2, "mount", "-t", "tmpfs", "tmpfs", data)
    try:
        job = user.submit("--nodes=3", overrides=LONG, SPARES="1", PREFLIGHT="1")
        finish(user, job, whole)
    finally:
        user.cluster.on_node(2, "umount", data)
    log = user.log(job)
    assert "node2 is not fit" in log and "training on node1,node3" in log
    assert "State=DRAIN" in log


def test_crash_loop_ends(user: User) -> None:
    """A rank dies at the same place in every leg: three legs, a code of its own, the reason in the last lines."""
    job = user.submit(
        overrides=RARE
        + " eval.windows_per_source=1 stages.one.until='70 steps' stages.anneal.from.before_end='1 steps'"
    )
    for leg in range(3):
        user.until_logged(job, f"restart {leg}, nodes")
        user.until(lambda: user.log(job).count("training starts at step 0") > leg, f"leg {leg}")  # noqa: B023
        time.sleep(1)
        user.until(lambda: user.cluster.tasks(1), "a rank")
        os.kill(user.cluster.tasks(1)[-1], signal.SIGKILL)
    ended = user.cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "70:0"), user.log(job)[-2000:]
    assert "3 starts in a row from step 0" in "\n".join(user.log(job).splitlines()[-20:])
    assert ended["Restarts"] == "2"


def test_false_success(user: User) -> None:
    """An srun that starts nothing and says 0: the job never counts as done, and does not try for ever."""
    fake = user.folder / "bin"
    fake.mkdir()
    (fake / "srun").write_text("#!/bin/sh\nexit 0\n")
    (fake / "srun").chmod(0o755)
    path = f"{fake}:{user.cluster.environment()['PATH']}"
    job = user.submit("--export=ALL,PATH=" + path, overrides=RARE)
    ended = user.cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "70:0"), user.log(job)
    assert "left with code 0 but is not finished" in user.log(job)
    assert not list((user.run / "slurm").glob("*.done"))


def test_stop_file(user: User) -> None:
    job = user.submit(overrides="stages.two.until='3000 steps' save.every='10000 steps'")
    user.until_line(20)
    (user.run / "stop").touch()
    ended = user.cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "71:0"), user.log(job)[-2000:]
    assert ended["Restarts"] == "0"
    assert "asked for a stop; remove it and submit again" in user.log(job)
    assert user.legs()[0]["progress"][1] >= 20


def test_scancel(user: User) -> None:
    """Saved, gone, and not back."""
    job = user.submit(overrides="stages.two.until='3000 steps' save.every='10000 steps'")
    user.until_line(20)
    user.cluster.run("scancel", job)
    user.until(lambda: not user.cluster.run("squeue", "-h", "-j", job), "end")
    time.sleep(8)  # longer than a requeued job waits
    assert user.cluster.job(job)["JobState"] == "CANCELLED"
    assert [p.name for p in (user.run / "checkpoints").glob("two-*")], "saved on TERM"


def test_preemption(user: User, whole: TinyRun) -> None:
    """An urgent job takes all nodes: the victim saves, leaves, comes back, and has lost no step."""
    job = user.submit("--signal=USR1@60", overrides=LONG)
    user.until_line(20)
    urgent = user.cluster.sbatch(
        "-p", "urgent", "--nodes=3", "--exclusive", f"--chdir={user.folder}", "--wrap", "sleep 3"
    )
    assert user.cluster.wait(urgent)["JobState"] == "COMPLETED"
    finish(user, job, whole)
    starts, ends = user.legs("start"), user.legs()
    assert starts[1]["progress"] == ends[0]["progress"] and starts[1]["progress"][1] >= 20


def test_controller_crash(user: User, whole: TinyRun) -> None:
    job = user.submit(overrides=LONG)
    user.until_line(10)
    user.cluster.crash_controller()
    time.sleep(2)
    user.cluster.start_controller()
    time.sleep(2)
    finish(user, job, whole)
    assert len(user.legs()) == 1, "the job did not notice"


def test_submit_and_status(user: User) -> None:
    """`smol submit` writes, submits and records; `smol status` asks Slurm and the files."""
    settings = {"SMOL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env = user.cluster.environment(**settings) | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(smol(*arguments), env=env, cwd=user.folder, capture_output=True, text=True)

    shape = ("--nodes", 1, "--gpus-per-node", 2, "--cpus-per-task", 2, "--time", "10")
    done = call("submit", "examples/tiny.yaml", *shape, "stages.two.until=40 steps")
    assert done.returncode == 0, done.stderr
    row = json.loads((user.run / "slurm/submissions.jsonl").read_text())
    assert row["version"] and "stages" in (user.run / "slurm/recipe.yaml").read_text()
    job = int(row["job"])
    user.until_line(5)
    found = json.loads(call("status", user.run, "--json").stdout)
    assert (found["state"], found["job"]) in (("training", str(job)), ("finished", str(job)))
    assert user.cluster.wait(job)["JobState"] == "COMPLETED"
    found = json.loads(call("status", user.run, "--json").stdout)
    assert (found["state"], found["progress"]) == ("finished", 1.0)
    assert "done: all stages" in (user.run / f"slurm/tiny-{job}.log").read_text()
