"""Who may put a job back into the queue: the leg that Slurm still knows, and no other."""

from __future__ import annotations

import pytest

from megatron_smol.slurm import clients
from megatron_smol.slurm.leg import Leg


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
    monkeypatch.setattr(clients, "job", lambda _: {"JobState": state, "Restarts": restarts})
    monkeypatch.setattr(clients, "ask", lambda *command: asked.append(command) or "")
    leg = Leg([], None, "7", "7", restart=2, nodes=["n1"], needed=1, tasks_per_node=1)  # type: ignore[arg-type]
    leg._requeue()
    assert asked == ([("scontrol", "requeue", "7")] if requeues else [])
