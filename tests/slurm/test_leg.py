"""Who may put a job back into the queue: the leg that Slurm still knows, and no other."""

from __future__ import annotations

import pytest

from megatron_smol.slurm import clients
from megatron_smol.slurm.leg import Leg
from megatron_smol.slurm.legs import Position


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
