"""One job trains in a run folder: what is left of an earlier start is waited for, then shut out; others are refused."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_smol.errors import InUseError, UserError
from megatron_smol.train import lock as lock_module
from megatron_smol.train.lock import RunLock, take_lock
from tests.tiny import TinyRun, environment, rows, smol

# `smol`, which stops itself when it comes to a place for the third time.
FREEZING = """
import os, signal
from megatron_smol import cli
from megatron_smol.checkpoint import folder
from megatron_smol.train.trainer import Trainer
owner, name = {"step": (Trainer, "_step"), "publishing": (folder, "publish"), "published": (folder, "prune")}[os.environ["FREEZE"]]
real, times = getattr(owner, name), []
def stopping(*arguments):
    times.append(1)
    if len(times) == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*arguments)
setattr(owner, name, stopping)
cli.entry()
"""
EARLIER = "job 7 of array 5, start 0.1, process 9 on node3"


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    with (tmp_path / ".lock").open("w") as lock:
        lock.write(EARLIER)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def take(
    folder: Path, patch: pytest.MonkeyPatch, said: list[str], seconds: str = "1", **slurm: str
) -> RunLock:
    for name in ("JOB_ID", "ARRAY_JOB_ID", "RESTART_COUNT"):
        patch.delenv(f"SLURM_{name}", raising=False)
    for name, value in (slurm | {"LOCK_SECONDS": seconds}).items():
        patch.setenv(name, value)
    return take_lock(folder, said.append)


OTHERS: list[dict[str, str]] = [
    {},
    {"SLURM_JOB_ID": "8"},
    {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "6", "SLURM_RESTART_COUNT": "3"},
    # Twice in one interactive allocation: neither is the other's successor.
    {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SMOL_ATTEMPT": "1"},
]


@pytest.mark.parametrize("slurm", OTHERS)
def test_others_are_refused_at_once(
    held: Path, monkeypatch: pytest.MonkeyPatch, slurm: dict[str, str]
) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"another job is training in .*process 9 on node3") as refused:
        take(held, monkeypatch, said, seconds="60", **slurm)
    assert refused.value.exit_code == 2 and not said


@pytest.mark.parametrize("later", [{"SLURM_RESTART_COUNT": "1"}, {"SMOL_ATTEMPT": "2"}])
def test_a_later_start_of_the_job_takes_over(
    held: Path, monkeypatch: pytest.MonkeyPatch, later: dict[str, str]
) -> None:
    said: list[str] = []
    lock = take(held, monkeypatch, said, SLURM_JOB_ID="7", **later)
    lock.require()
    assert "still held by an earlier leg" in said[0] and "taken over" in said[1]
    assert (held / ".lock").read_text().startswith("job 7, start ")
    again: list[str] = []
    with pytest.raises(UserError, match="another job"):
        take(held, monkeypatch, again, SLURM_JOB_ID="8")
    lock.close()
    take(held, monkeypatch, again, SLURM_JOB_ID="8").close()
    assert not again


def test_who_was_shut_out_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take(tmp_path, monkeypatch, [], SLURM_JOB_ID="7")
    first.require()
    second = take(tmp_path, monkeypatch, [], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    with pytest.raises(InUseError, match="taken over by a later start"):
        first.require()
    second.require()


def test_who_was_shut_out_finds_out_where_nodes_do_not_see_each_others_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre's localflock, say: the later start gets the lock at once, of the same file."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    said: list[str] = []
    first = take(tmp_path, monkeypatch, said, SLURM_JOB_ID="7")
    first.require()
    second = take(tmp_path, monkeypatch, said, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert not said
    with pytest.raises(InUseError, match="taken over by a later start"):
        first.require()
    second.require()


@pytest.mark.parametrize("free", [True, False])
def test_a_start_that_was_frozen_before_it_took_the_lock_leaves_it_to_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    later = take(tmp_path, monkeypatch, [], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    text = (tmp_path / ".lock").read_text()
    if free:  # or where nodes do not see each other's flock
        later.close()
    with pytest.raises(InUseError, match="belongs to a later start of this job"):
        take(tmp_path, monkeypatch, [], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert (tmp_path / ".lock").read_text() == text
    later.require()


def test_who_takes_over_looks_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen after it had waited, while a later start took over."""
    first, said = take(tmp_path, monkeypatch, [], SLURM_JOB_ID="7"), []
    real = lock_module._taken_over

    def late(folder: Path) -> RunLock:
        with monkeypatch.context() as patch:
            patch.setattr(lock_module, "_taken_over", real)
            later.append(take(folder, patch, [], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2"))
        return real(folder)

    later: list[RunLock] = []
    monkeypatch.setattr(lock_module, "_taken_over", late)
    with pytest.raises(InUseError, match="belongs to a later start of this job"):
        take(tmp_path, monkeypatch, said, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    later[0].require()
    first.close()


def test_a_holder_that_has_not_written_yet_is_not_taken_for_another_job(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is that of whoever had the folder before."""
    (held / ".lock").write_text("job 6, start 0.0, process 9 on node3")
    monkeypatch.setattr(lock_module.time, "sleep", lambda _: (held / ".lock").write_text(EARLIER))
    with pytest.raises(InUseError, match="earlier leg still holds"):
        take(held, monkeypatch, [], SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="5")


def test_an_element_of_the_array_is_waited_for_but_not_shut_out(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InUseError, match=r"earlier leg still holds .* after 1 s"):
        take(held, monkeypatch, [], SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="5")


def test_what_goes_in_time_is_only_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, said = take(tmp_path, monkeypatch, [], SLURM_JOB_ID="7"), []

    def say(line: str) -> None:
        said.append(line)
        first.close()

    monkeypatch.setenv("LOCK_SECONDS", "60")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = take_lock(tmp_path, say)
    assert len(said) == 1 and "waits" in said[0]
    lock.require()


@pytest.mark.parametrize("place", ["step", "publishing", "published"])
def test_a_frozen_run_that_thaws_too_late_writes_nothing(tiny: TinyRun, place: str) -> None:
    """On one process, so that no dead peer stops it: only its lock can. Its saves are waited for, so that it is frozen in them."""
    train = ("train", str(tiny.recipe), "save.asynchronous=false")
    first = start(tiny, sys.executable, "-c", FREEZING, *train, SLURM_RESTART_COUNT="0", FREEZE=place)
    wait_until_stopped(first)
    try:
        second = start(tiny, *smol(*train), SLURM_RESTART_COUNT="1", LOCK_SECONDS="1")
        output, _ = second.communicate(timeout=600)
        assert second.returncode == 0 and "is taken over" in output, output
        written = contents(tiny.run)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=600)
    assert first.returncode == 7 and "taken over by a later start" in output, output
    assert contents(tiny.run) == written
    steps = [(row["stage"], row["step"]) for row in rows(tiny.run / "metrics.jsonl")]
    assert len(steps) == len(set(steps)) and steps[-1] == ("long", 13)


def contents(run: Path) -> dict[Path, bytes]:
    """Of a run's files, but for heartbeats and what TensorBoard's own thread had in hand."""
    own = {"watchdog", "tensorboard"}
    return {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not own & set(path.parts)
    }


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until and process.poll() is None, "it did not stop"
        time.sleep(0.05)


def start(tiny: TinyRun, *command: str, **slurm: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment(SLURM_JOB_ID="7", **slurm),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
