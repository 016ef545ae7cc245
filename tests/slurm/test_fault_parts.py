"""Faults of parts of a job: a rank that crashes, Slurm's daemon of a node, the batch script, a short cut of the network,
a signal in the middle of a save. And the shipped script at its real size."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import LONG, MINUTE, REPOSITORY, User
from tests.slurm.strikes import finish, struck, to_nodes, until_saving
from tests.slurm.table import FaultTable, Trial, trials
from tests.tiny import TinyRun

pytestmark = [pytest.mark.slurm, pytest.mark.faults]
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGHUP, signal.SIGBUS)


def test_a_rank_crashes(user: User, whole: TinyRun, table: FaultTable) -> None:
    chance, left = random.Random(2), list(CRASHES)

    def crash(job: int) -> None:
        user.until(lambda: user.is_over(job) or user.ranks(job), "rank")
        if ranks := user.ranks(job):
            left.append(left.pop(0))
            os.kill(chance.choice(ranks), left[-1])

    made = struck(user, whole, trials(4), crash)
    what = "a random rank crashes (SIGSEGV, SIGABRT, SIGHUP, SIGBUS)"
    table.add(what, "`training was ended by SIG...; ... goes on`", "equal", made)


@pytest.mark.parametrize("place", [0, 1], ids=["batch host", "other node"])
def test_slurmd_killed(user: User, whole_of_a_minute: TinyRun, table: FaultTable, place: int) -> None:
    """The job's processes outlive it there, and Slurm starts the job elsewhere: never two that train."""
    faults = user.cluster.kill_slurmd, user.cluster.reboot
    made = to_nodes(user, whole_of_a_minute, place, trials(1), *faults, overrides=MINUTE)
    what = "the node that runs the batch script" if place == 0 else "another node of the job"
    table.add(f"`slurmd` killed on {what}", "Slurm requeues: `restart 1, nodes ...`", "equal", made)


def test_the_batch_script_is_killed(user: User, whole: TinyRun, table: FaultTable) -> None:
    """Nobody is left to decide: the job has failed, with nothing left on the nodes; submitted again it goes on."""
    job = user.submit(overrides=LONG)
    user.until_line(25)
    [batch] = user.cluster.running(user.cluster.names(job)[0], b"slurm.leg")
    at = time.monotonic()
    os.kill(batch, signal.SIGKILL)
    ended = user.cluster.wait(job)
    gone = time.monotonic() - at
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0"
    user.until(lambda: not any(user.cluster.tasks(node) for node in (1, 2, 3)), "end of the ranks", 60)
    lines = user.lines()
    again = user.submit(overrides=LONG)
    finish(user, again, whole)
    lost = lines - user.legs("start")[-1]["progress"][1]
    table.add(
        "`kill -9` of the batch script",
        "nothing: it was the one to say it",
        "FAILED with signal 9; submitted again: equal",
        [Trial(gone, None, lost)],
    )


def test_the_network_is_cut_for_five_seconds(user: User, whole: TinyRun, table: FaultTable) -> None:
    job = user.submit(overrides=LONG)
    user.until_line(15)
    node = user.cluster.names(job)[1]
    user.cluster.cut_link(node)
    time.sleep(5)
    user.cluster.mend_link(node)
    finish(user, job, whole)
    assert len(user.legs()) == 1, "the leg goes on"
    table.add(
        "network of a node cut for 5 s", "nothing: the ranks wait", "equal, same leg", [Trial(None, None, 0)]
    )


def test_a_link_that_is_slow_and_loses_packets(user: User, whole: TinyRun, table: FaultTable) -> None:
    with user.cluster.narrow_link(2) as dropped:
        job = user.submit(overrides=LONG)
        finish(user, job, whole)
        lost = dropped()
    assert len(user.legs()) == 1 and lost > 0, "the leg goes on"
    table.add(
        "8 Mbit/s between two nodes of the job, up to 60 ms late, the rest dropped",
        "nothing: steps are slower",
        f"equal, same leg; {lost} packets lost",
        [Trial(None, None, 0)],
    )


def test_broken_connections(user: User, whole: TinyRun, table: FaultTable) -> None:
    """All TCP connections of a rank are reset at once."""
    broken = []

    def cut(job: int) -> None:
        user.until(lambda: user.is_over(job) or user.ranks(job), "rank")
        broken.append(user.cluster.reset_connections(user.cluster.names(job)[1]))

    made = struck(user, whole, trials(3), cut)
    assert any(broken)
    table.add("all TCP connections of a rank reset", "`... Connection reset by peer ...`", "equal", made)


def test_signals_during_a_save(user: User, whole: TinyRun, table: FaultTable) -> None:
    """USR1 twice while a checkpoint is being written: finished, saved, code 75, no step lost."""
    made = []
    for _ in range(trials(3)):
        job = user.submit(overrides=LONG)
        user.until_line(12)
        assert until_saving(user, job)
        at = time.monotonic()
        for _ in range(2):
            user.cluster.usr1(job)
        user.until(user.legs, "end of the leg")
        made.append(Trial(time.monotonic() - at, None, 0))
        finish(user, job, whole)
        assert (
            user.legs()[0]["code"] == 75 and user.legs("start")[1]["progress"] == user.legs()[0]["progress"]
        )
        shutil.rmtree(user.run)
    table.add("USR1 twice while a checkpoint is written", "`training asked for a restart`", "equal", made)


def test_data_that_differ_on_one_node(user: User, whole: TinyRun, table: FaultTable) -> None:
    """Another version of a source on node 2, and no spare: refused before training, and the node is named."""
    other, data = user.folder / "other", whole.data / "web"
    shutil.copytree(whole.data / "code", other)
    user.cluster.on_node(2, "mount", "--bind", str(other), str(data))
    try:
        job = user.submit(
            "--nodes=3", overrides=f"{LONG} training.global_batch=12", PREFLIGHT="1", FUTILE_LEGS="1"
        )
        ended = user.cluster.wait(job, seconds=120)
    finally:
        user.cluster.on_node(2, "umount", str(data))
    log = user.log(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "70:0"), log[-3000:]
    assert "node2 is not fit: sources is " in log and "2 of 3 nodes are fit, 3 are needed" in log
    assert not (user.run / "metrics.jsonl").exists()
    table.add(
        "a source that differs on one node",
        "`node2 is not fit: sources is ...`",
        "not started",
        [Trial(0, None, 0)],
    )


def test_the_shipped_scripts_at_their_real_size(tmp_path: Path, cluster: Cluster) -> None:
    """32 nodes of 8 GPUs: Slurm accepts them unchanged, and the job starts on what its recipe needs."""
    seen = tmp_path / "seen"
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$SLURM_JOB_NUM_NODES $SLURM_NTASKS $SLURM_GPUS_ON_NODE $*" >> {seen}\n'
    )
    python.chmod(0o755)
    with Cluster(Path(cluster.folder.parent) / "32", nodes=32) as large:
        for name in ("1.7b", "360m", "135m"):
            script = REPOSITORY / f"examples/smollm2_{name}.sh"
            job = large.sbatch(f"--chdir={tmp_path}", script, VENV=str(tmp_path / "venv"))
            assert large.wait(job, seconds=120)["JobState"] == "COMPLETED"
    leg = "-m megatron_smol.slurm.leg examples/smollm2"
    assert seen.read_text().splitlines() == [
        f"32 256 8 {leg}_1.7b.yaml",
        f"8 64 8 {leg}_360m.yaml",
        f"8 64 8 {leg}_135m.yaml",
    ]
