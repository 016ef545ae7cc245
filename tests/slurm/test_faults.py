"""What clusters do to a run, done to one under a real Slurm: `make faults`, or `pytest -m faults tests/slurm`.

Every run that may end must end bit-equal to the one that nothing happened to.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import LONG, MINUTE, User, assert_nothing_lost
from tests.slurm.strikes import Strike, finish, struck, to_nodes, until_saving
from tests.slurm.table import FaultTable, Trial, trials
from tests.tiny import TinyRun, smol

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
RARE = "stages.two.until='80 steps' save.every='10000 steps'"


def test_kill_9_of_a_rank(user: User, whole: TinyRun, table: FaultTable) -> None:
    chance = random.Random(1)

    def kill(job: int) -> None:
        user.until(lambda: user.is_over(job) or user.ranks(job), "rank")
        if ranks := user.ranks(job):
            os.kill(chance.choice(ranks), signal.SIGKILL)

    made = struck(user, whole, trials(20), kill)
    table.add(
        "`kill -9` of a random rank at a random moment",
        "`training was ended by SIGKILL; ... goes on`",
        "equal",
        made,
    )


def test_kill_9_in_a_save(user: User, whole: TinyRun, table: FaultTable) -> None:
    """Of a random rank, at a random moment of the next save."""
    chance, unfinished = random.Random(2), 0

    def kill(job: int) -> None:
        nonlocal unfinished
        user.until(lambda: user.is_over(job) or user.ranks(job), "rank")
        ranks = user.ranks(job)
        saving = until_saving(user, job)
        if saving is None or not ranks:
            return
        time.sleep(chance.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(ranks), signal.SIGKILL)
        unfinished += saving.exists()

    made = struck(user, whole, trials(20), kill)
    assert unfinished > len(made) // 3, "most of them in the middle of it"
    table.add(
        "`kill -9` of a random rank while a checkpoint is written",
        "`training was ended by SIGKILL; ... goes on`",
        f"equal; {unfinished} saves were left unfinished",
        made,
    )


@pytest.mark.parametrize("place", [0, 1], ids=["batch host", "other node"])
def test_power_loss(user: User, whole: TinyRun, table: FaultTable, place: int) -> None:
    made = to_nodes(user, whole, place, trials(3), user.cluster.cut_power, user.cluster.boot)
    what = "the node that runs the batch script" if place == 0 else "another node of the job"
    table.add(f"power loss of {what}", "Slurm requeues: `restart 1, nodes ...`", "equal", made)


@pytest.mark.parametrize("place", [0, 1], ids=["batch host", "other node"])
def test_frozen_node(user: User, whole: TinyRun, table: FaultTable, place: int) -> None:
    """SIGSTOP of everything on it. Thawed when the run is elsewhere, it must not touch the run."""
    made = to_nodes(user, whole, place, trials(2), user.cluster.freeze, user.cluster.thaw)
    what = "the node that runs the batch script" if place == 0 else "another node of the job"
    table.add(
        f"{what} frozen (SIGSTOP of all its processes)",
        "Slurm requeues: `restart 1, nodes ...`",
        "equal",
        made,
    )


def test_frozen_batch_host_where_slurm_is_patient(user: User, whole: TinyRun, table: FaultTable) -> None:
    """A step's daemon on a healthy node tries for a minute to tell a frozen `srun` that its tasks ended, and the node is
    not free before. Where Slurm gives a silent node minutes, as most do, the watchdog has ended the ranks long before."""
    made = []
    with user.cluster.patience(100):
        for _ in range(trials(2)):
            job = user.submit(overrides=f"{LONG} guard.step_timeout=20")
            user.until_line(30)
            node, strike = user.cluster.names(job)[0], Strike.now(user, job)
            user.cluster.freeze(node)
            try:
                made.append(strike.followed(whole.run))
            finally:
                user.cluster.reboot(node)
            finish(user, job, whole)
            user.until(lambda: user.cluster.idle() == 3, "boot")
            shutil.rmtree(user.run)
    table.add(
        "the node that runs the batch script frozen in a step, where Slurm waits 100 s for a silent node and the watchdog 20 s",
        "Slurm requeues: `restart 1, nodes ...`",
        "equal",
        [trial for trial in made if trial],
    )


def test_node_frozen_for_good(user: User, whole: TinyRun, table: FaultTable) -> None:
    """Its ranks keep the run folder's lock, as one does that waits for a driver for ever: the next leg takes the folder
    over, and what thaws when the run is done touches nothing."""
    job = user.submit(overrides=LONG, LOCK_SECONDS="20")
    user.until_line(30)
    node = user.cluster.names(job)[0]
    strike = Strike.now(user, job)
    user.cluster.freeze(node)
    try:
        trial = strike.followed(whole.run)
        finish(user, job, whole)
    finally:
        user.cluster.thaw(node)
        user.until(lambda: user.cluster.idle() == 3, "thawed node", seconds=300)
    assert "is taken over" in user.log(job)
    assert_nothing_lost(user, whole)
    assert trial is not None
    table.add(
        "the node that runs the batch script frozen for the rest of the run",
        "`... is taken over: Slurm started this job again`",
        "equal, also after it thaws",
        [trial],
    )


def test_network_cut(user: User, whole: TinyRun, table: FaultTable) -> None:
    made = to_nodes(user, whole, 1, trials(2), user.cluster.cut_link, user.cluster.mend_link)
    table.add("network of a node cut", "Slurm requeues: `restart 1, nodes ...`", "equal", made)


def test_lost_node_is_replaced_inside_the_job(user: User, whole: TinyRun, table: FaultTable) -> None:
    """Three nodes for two, --no-kill: the same leg goes on with the spare, without a place in the queue."""
    job = user.submit(
        "--nodes=3", "--no-kill", overrides=LONG, SPARES="1", PREFLIGHT="1", PREFLIGHT_SECONDS="120"
    )
    user.until_line(20)
    strike = Strike.now(user, job)
    user.cluster.cut_power(2)
    try:
        trial = strike.followed(whole.run)
        finish(user, job, whole)
    finally:
        user.cluster.boot(2)
        user.until(lambda: user.cluster.idle() == 3, "boot")
    starts = user.legs("start")
    assert {leg["restart"] for leg in starts} == {0} and starts[-1]["attempt"] >= 1
    assert "node2 is not fit" in user.log(job)
    assert user.legs()[-1]["nodes"] == ["node1", "node3"]
    assert trial is not None
    table.add(
        "power loss of a node, with a spare in the job", "`node2 is not fit: ...`", "equal, same leg", [trial]
    )


def test_a_node_without_the_data_is_named_and_left_out(user: User, whole: TinyRun, table: FaultTable) -> None:
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
    table.add(
        "data missing on one node, with a spare",
        "`node2 is not fit: ...`",
        "equal, same leg",
        [Trial(0, 0, 0)],
    )


def test_crash_loop_ends(user: User, table: FaultTable) -> None:
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
    told = "`3 starts in a row from step 0 reached no new one`"
    table.add(
        "a rank dies in every leg before a checkpoint", told, "FAILED with 70 after three legs", [Trial()]
    )


def test_false_success(user: User, table: FaultTable) -> None:
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
    told = "`left with code 0 but is not finished`"
    table.add(
        "an `srun` that starts nothing and returns 0", told, "FAILED with 70 after three legs", [Trial()]
    )


def test_stop_file(user: User, table: FaultTable) -> None:
    job = user.submit(overrides="stages.two.until='3000 steps' save.every='10000 steps'")
    user.until_line(20)
    at = time.monotonic()
    (user.run / "stop").touch()
    ended = user.cluster.wait(job)
    gone = time.monotonic() - at
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "71:0"), user.log(job)[-2000:]
    assert ended["Restarts"] == "0"
    assert "asked for a stop; remove it and submit again" in user.log(job)
    assert user.legs()[0]["progress"][1] >= 20
    table.add(
        "`touch RUN/stop`",
        "`asked for a stop; remove it and submit again`",
        "saved, FAILED with 71",
        [Trial(gone, None, 0)],
    )


def test_scancel(user: User, table: FaultTable) -> None:
    """Saved, gone, and not back."""
    job = user.submit(overrides="stages.two.until='3000 steps' save.every='10000 steps'")
    user.until_line(20)
    at = time.monotonic()
    user.cancel(job)
    gone = time.monotonic() - at
    time.sleep(8)  # longer than a requeued job waits
    assert user.cluster.job(job)["JobState"] == "CANCELLED"
    assert [p.name for p in (user.run / "checkpoints").glob("two-*")], "saved on TERM"
    table.add(
        "`scancel`",
        "`the job was cancelled; submit again to go on from ...`",
        "saved, CANCELLED",
        [Trial(gone, None, 0)],
    )


def test_preemption(user: User, whole: TinyRun, table: FaultTable) -> None:
    """An urgent job takes all nodes: the victim saves, leaves, comes back, and has lost no step."""
    made = []
    for _ in range(trials(3)):
        job = user.submit("--signal=USR1@60", overrides=LONG)
        user.until_line(20)
        strike = Strike.now(user, job)
        urgent = user.cluster.sbatch(
            "-p", "urgent", "--nodes=3", "--exclusive", f"--chdir={user.folder}", "--wrap", "sleep 3"
        )
        trial = strike.followed(whole.run)
        assert user.cluster.wait(urgent)["JobState"] == "COMPLETED"
        finish(user, job, whole)
        starts, ends = user.legs("start"), user.legs()
        assert starts[1]["progress"] == ends[0]["progress"] and starts[1]["progress"][1] >= 20
        assert trial is not None and trial.steps_lost == 0
        made.append(trial)
        shutil.rmtree(user.run)
    table.add(
        "preemption by an urgent job", "`training asked for a restart (saved on a signal ...)`", "equal", made
    )


def test_controller_crash(user: User, whole_of_a_minute: TinyRun, table: FaultTable) -> None:
    job = user.submit(overrides=MINUTE)
    user.until_line(10)
    user.cluster.crash_controller(job)
    time.sleep(2)
    user.cluster.start_controller()
    time.sleep(2)
    finish(user, job, whole_of_a_minute)
    assert len(user.legs()) == 1, "the job did not notice"
    table.add(
        "`slurmctld` killed and started again",
        "nothing: the job does not notice",
        "equal",
        [Trial(None, None, 0)],
    )


def test_the_controller_is_away_when_a_leg_ends(
    user: User, whole_of_a_minute: TinyRun, table: FaultTable
) -> None:
    job = user.submit(overrides=MINUTE)
    user.until_line(30)
    ranks = user.ranks(job)
    user.cluster.crash_controller(job)
    for rank in ranks:
        os.kill(rank, signal.SIGUSR1)
    user.until(lambda: "training asked for a restart" in str(user.legs()), "end of the leg")
    time.sleep(8)
    user.cluster.start_controller()
    finish(user, job, whole_of_a_minute)
    assert len(user.legs()) == 2, "asked for again until it answered"
    table.add(
        "`slurmctld` away for ten seconds when a leg ends",
        "`requeued; the same job goes on in the same log`",
        "equal",
        [Trial(None, None, 0)],
    )


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
