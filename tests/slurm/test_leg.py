"""Who may put a job back into the queue: the leg that Slurm still knows, and no other."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.errors import UserError
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import make_plan, resolve_sizes
from megatron_smol.slurm import clients
from megatron_smol.slurm import leg as leg_module
from megatron_smol.slurm.leg import Leg
from megatron_smol.slurm.legs import Position
from tests.tiny import TinyRun


@pytest.mark.parametrize(
    ("state", "restarts", "requeues"),
    [("RUNNING", "2", True), ("TIMEOUT", "2", True), ("RUNNING", "3", False), ("PENDING", "3", False), ("PREEMPTED", "2", False)],
)  # fmt: skip
def test_a_leg_that_slurm_has_replaced_does_not_end_its_successor(
    monkeypatch: pytest.MonkeyPatch, state: str, restarts: str, requeues: bool
) -> None:
    """A node whose slurmd died runs on while Slurm starts the job elsewhere: a requeue from there would kill that start."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(clients, "job", lambda *_, patient: {"JobState": state, "Restarts": restarts})
    monkeypatch.setattr(clients, "ask", lambda *command: asked.append(command) or "")
    leg = Leg([], None, "7", "7", restart=2, nodes=["n1"], needed=1, tasks_per_node=1)  # type: ignore[arg-type]
    leg._requeue()
    assert asked == ([("scontrol", "requeue", "7")] if requeues else [])


def test_a_job_that_slurm_will_hold_is_told_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm requeues a job that lost its nodes a few times only; what it prints is Slurm 22.05's own."""
    settings = "SchedulerParameters     = bf_interval=1{more}\nSchedulerTimeSlice      = 30 sec"
    leg = Leg([], None, "7", "7", restart=2, nodes=["n1"], needed=1, tasks_per_node=1)  # type: ignore[arg-type]
    for more, losses, told in (("", 3, True), ("", 2, False), (",max_batch_requeue=1000", 3, False)):
        text = settings.format(more=more)
        monkeypatch.setattr(clients, "ask", lambda *command, text=text: text)
        leg._after_a_loss([{"event": "start", "job": "7"}] * losses, Position(None, False))
        said = capsys.readouterr().out
        assert "left no word" in said and ("scontrol release 7" in said) == told


@pytest.mark.parametrize(
    ("state", "reason", "held"),
    [("REQUEUE_HOLD", "JobHoldMaxRequeue", True), ("PENDING", "launch_failed_requeued_held", True), ("PENDING", "Priority", False)],
)  # fmt: skip
def test_a_held_job(state: str, reason: str, held: bool) -> None:
    assert clients.is_held({"JobState": state, "Reason": reason}) == held


def tiny_leg(tiny: TinyRun, restart: int) -> Leg:
    recipe = load_recipe(tiny.recipe)
    plan = make_plan(recipe, resolve_sizes(recipe))
    return Leg([str(tiny.recipe)], plan, "7", "7", restart, nodes=["n1"], needed=1, tasks_per_node=1)


class Away:
    """os.scandir of a file system that does not answer for a while; everything else is as it was."""

    def __init__(self, times: int) -> None:
        self.times, self.asked, self.real = times, 0, os.scandir

    def __call__(self, path: Any) -> Any:
        if Path(path).name == "checkpoints":
            self.asked += 1
            if self.asked <= self.times:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return self.real(path)


def test_a_file_system_that_comes_back_is_waited_for(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leg = tiny_leg(tiny, restart=0)
    away = Away(times=3)
    monkeypatch.setattr(os, "scandir", away)
    monkeypatch.setattr(leg_module, "ROOM_POLL_SECONDS", 0.01)
    assert leg._position() == Position(None, False) and away.asked == 4
    assert capsys.readouterr().out.count("Stale file handle") == 1


def test_one_that_stays_away_costs_a_requeue_and_not_the_job(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(clients, "job", lambda *_, patient: {"JobState": "RUNNING", "Restarts": "0"})
    monkeypatch.setattr(clients, "ask", lambda *command: asked.append(command) or "")
    monkeypatch.setattr(os, "scandir", Away(times=1000))
    monkeypatch.setattr(leg_module, "ROOM_POLL_SECONDS", 0.01)
    monkeypatch.setattr(leg_module.signal, "signal", lambda *_: None)
    monkeypatch.setenv("ROOM_SECONDS", "0.1")
    assert tiny_leg(tiny, restart=0).go() == 75
    assert asked == [("scontrol", "requeue", "7")]
    assert "restart: the file system of the run folder does not answer" in capsys.readouterr().out


def test_a_run_folder_that_is_gone_is_not_begun_again(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not mounted here, most likely; training would start at step 0 beside the run."""
    monkeypatch.setattr(leg_module, "ROOM_POLL_SECONDS", 0.01)
    monkeypatch.setenv("ROOM_SECONDS", "0.1")
    tiny_leg(tiny, restart=0)._require_folder()
    with pytest.raises(UserError, match=r"run folder .* is not there; bring it back"):
        tiny_leg(tiny, restart=1)._require_folder()
    tiny.run.mkdir(parents=True)
    tiny_leg(tiny, restart=1)._require_folder()


def test_a_full_disk_does_not_undo_what_is_done(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUN/slurm is a file, so that the mark has no place; it is not what makes a run done."""
    tiny.run.mkdir(parents=True)
    (tiny.run / "slurm").touch()
    leg = tiny_leg(tiny, restart=0)
    decision = leg_module.decide(leg_module.Evidence(0, finished=True))
    assert leg._end(decision, leg._position()) == 0
    assert "could not be written" in capsys.readouterr().out
