"""Who may put a job back into the queue: the leg that Slurm still knows, and no other."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.errors import DiskError, UserError
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import make_plan, resolve_sizes
from megatron_smol.slurm import clients, run_folder
from megatron_smol.slurm import leg as leg_module
from megatron_smol.slurm.leg import Leg
from megatron_smol.slurm.legs import Position, append_row
from tests.tiny import TinyRun


@pytest.mark.parametrize(
    ("state", "reason", "restarts", "signals", "requeues"),
    [
        ("RUNNING", "None", "2", [], True), ("RUNNING", "None", "3", [], False), ("PENDING", "None", "3", [], False),
        ("PREEMPTED", "None", "2", [], False),
        ("COMPLETING", "TimeLimit", "2", [signal.SIGTERM], True), ("COMPLETING", "None", "2", [signal.SIGTERM], False),
        ("", "", "2", [], True), ("", "", "2", [signal.SIGTERM], False),
    ],
)  # fmt: skip
def test_who_is_requeued(
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    reason: str,
    restarts: str,
    signals: list[int],
    requeues: bool,
) -> None:
    """A node whose slurmd died runs on while Slurm starts the job elsewhere: a requeue from there would kill that start.
    At its time limit a job is COMPLETING, as after scancel (seen with Slurm 22.05). "": the controller gives no answer."""
    asked: list[tuple[str, ...]] = []

    def job(*_: Any, patient: bool) -> dict[str, str]:
        if not state:
            raise UserError("'scontrol' refused: something nobody has seen before")
        return {"JobState": state, "Reason": reason, "Restarts": restarts}

    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(clients, "job", job)
    monkeypatch.setattr(clients, "ask", lambda *command: asked.append(command) or "")
    leg = Leg([], None, "7", "7", restart=2, nodes=["n1"], needed=1, tasks_per_node=1, signalled=signals)  # type: ignore[arg-type]
    leg._requeue()
    assert asked == ([("scontrol", "requeue", "7")] if requeues else [])


def test_a_job_that_slurm_will_hold_is_told_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm requeues a job that lost its nodes a few times only; the first text is Slurm 22.05's own."""
    settings = "SchedulerParameters     = bf_interval=1\n{more}SchedulerTimeSlice      = 30 sec"
    leg = Leg([], None, "7", "7", restart=2, nodes=["n1"], needed=1, tasks_per_node=1)  # type: ignore[arg-type]
    for more, losses, told in (("", 3, True), ("", 2, False), ("MaxBatchRequeue         = 1000\n", 3, False)):
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


@pytest.mark.parametrize(
    ("element", "told"), [("19", "the next one goes on"), ("20", "submit another to go on")]
)
def test_an_element_of_an_array_leaves_it_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[Any],
    element: str,
    told: str,
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", element)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "20")
    leg = Leg([], None, "7", "5", restart=0, nodes=["n1"], needed=1, tasks_per_node=1)  # type: ignore[arg-type]
    leg._requeue()
    assert told in capsys.readouterr().out and not asked


@pytest.mark.parametrize(
    ("left", "in_place"),
    [
        ("15:01", True),
        ("14:59", False),
        ("1:00:00", True),
        ("2-00:00:00", True),
        ("UNLIMITED", True),
        ("0:00", False),
    ],
)
def test_a_spare_takes_over_only_where_time_is_left(
    monkeypatch: pytest.MonkeyPatch, left: str, in_place: bool
) -> None:
    """The ranks left because the limit comes: what began again inside this allocation would be killed by it."""
    monkeypatch.setattr(clients, "job", lambda *_, patient: {"JobState": "RUNNING"})
    monkeypatch.setattr(clients, "ask", lambda *command: left)
    leg = Leg([], None, "7", "7", restart=0, nodes=["n1", "n2"], needed=1, tasks_per_node=1)  # type: ignore[arg-type]
    assert leg._again_in_place() == in_place


def test_the_requeue_comes_before_an_alert_when_slurm_is_about_to_kill(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for signals, order in (([signal.SIGTERM], ["requeue", "alert"]), ([], ["alert", "requeue"])):
        done: list[str] = []
        monkeypatch.setattr(Leg, "_requeue", lambda self, done=done: done.append("requeue"))
        monkeypatch.setattr(Leg, "_alert", lambda self, *_, done=done: done.append("alert"))
        leg = tiny_leg(tiny, restart=0)
        leg.signalled = signals
        assert leg._end(leg_module.decide(leg_module.Evidence(75)), leg.folder.position()) == 75
        assert done == order


def test_an_array_whose_element_stopped_for_good(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its later ones would train to the same place. Another array, or the same element released by a person, may go on."""
    row = {
        "event": "end",
        "job": "6",
        "chain": "5",
        "restart": 0,
        "progress": [0, 0],
        "code": 5,
        "action": "stop",
    }
    append_row(tiny.run / "legs.jsonl", row | {"reason": "the loss is nan", "exit_code": 5})
    leg = tiny_leg(tiny, restart=0)
    monkeypatch.setattr(leg, "_attempt", lambda: leg_module.Decision(leg_module.Action.STOP, 99, "was tried"))
    for job, chain, code in (("7", "5", 5), ("6", "5", 99), ("7", "7", 99)):
        leg.job, leg.chain = job, chain
        assert leg.go() == code
    assert "the array's job 6 ended it: the loss is nan (exit code 5)" in capsys.readouterr().out
    append_row(tiny.run / "legs.jsonl", row | {"reason": "RUN/stop asked for it", "exit_code": 71})
    leg.job, leg.chain = "7", "5"
    assert leg.go() == 99


@pytest.mark.parametrize(
    ("said", "tasks"),
    [
        ({"SLURM_NTASKS": "32", "SLURM_NTASKS_PER_NODE": "8"}, 8), ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NTASKS": "4"}, 1), ({}, 1),
    ],
)  # fmt: skip
def test_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], tasks: int) -> None:
    """`sbatch --nodes=4-8` leaves SLURM_NTASKS out."""
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert leg_module._tasks_per_node(4) == tasks


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("ROOM_SECONDS", "0.1")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What a leg whose job Slurm calls running asks of Slurm."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(clients, "job", lambda *_, patient: {"JobState": "RUNNING"})
    monkeypatch.setattr(clients, "ask", lambda *command: commands.append(command) or "")
    return commands


def test_a_file_system_that_comes_back_is_waited_for(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Away(times=3)
    monkeypatch.setenv("ROOM_SECONDS", "60")
    monkeypatch.setattr(os, "scandir", away)
    assert tiny_leg(tiny, restart=0).folder.position() == Position(None, False) and away.asked == 4
    assert capsys.readouterr().out.count("Stale file handle") == 1


def test_one_that_stays_away_costs_starts_and_in_the_end_the_job(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, quick: None, asked: list[Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Rows cannot count them, so the job's log does; one that trained in between begins the count anew."""
    tiny.run.mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", Away(times=1000))
    log = tmp_path / "job.log"
    monkeypatch.setattr(leg_module, "LOG", log)
    log.write_text("the run folder is out of reach\nleg: preflight: training on node1\n")
    for restart, code in enumerate([75, 75, 70]):
        assert tiny_leg(tiny, restart).go() == code
        said = capsys.readouterr().out
        assert "Stale file handle" in said and ("in 3 starts in a row" in said) == (code == 70)
        with log.open("a") as file:
            file.write(said)
    assert asked == [("scontrol", "requeue", "7")] * 2


def test_what_waiting_does_not_mend_is_the_users(tiny: TinyRun, quick: None, asked: list[Any]) -> None:
    tiny.run.mkdir(parents=True)
    (tiny.run / "checkpoints").touch()
    with pytest.raises(UserError, match=r"run folder cannot be used: .*checkpoints"):
        tiny_leg(tiny, restart=500).go()
    assert not asked


def test_a_run_folder_that_is_gone_is_not_begun_again(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, quick: None, asked: list[Any], tmp_path: Path
) -> None:
    """Not mounted here, most likely; training would start at step 0 beside the run. One that was never made is made."""
    log = tmp_path / "job.log"
    monkeypatch.setattr(leg_module, "LOG", log)
    log.write_text("slurmstepd: error: prolog failed\n")
    for restart in (0, 1):
        leg = tiny_leg(tiny, restart)
        leg.folder.require(leg._trained_before)
    log.write_text("leg: preflight: training on node1\n")
    with pytest.raises(DiskError, match=r"trained before, is not there"):
        leg.folder.require(leg._trained_before)
    assert leg.go() == 75 and not tiny.run.exists() and asked == [("scontrol", "requeue", "7")]
    tiny.run.mkdir(parents=True)
    leg.folder.require(leg._trained_before)


def test_a_run_folder_that_goes_between_two_tries_of_one_start(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path
) -> None:
    """A spare takes a lost node's place, and the file system went with that node."""
    monkeypatch.setattr(leg_module, "LOG", tmp_path / "job.log")
    (tmp_path / "job.log").write_text("leg: preflight: training on node1\n")
    leg = tiny_leg(tiny, restart=0)
    leg.attempt = 1
    with pytest.raises(DiskError, match="trained before, is not there"):
        leg._attempt()
    assert not tiny.run.exists()


LOGGING = """
import sys
from megatron_smol.slurm.leg import Leg
Leg([], None, "7", "7", 0, ["n1"], 1, 1).say("a line")
sys.exit(75)
"""


def test_a_log_on_a_full_disk_changes_no_exit_code() -> None:
    with Path("/dev/full").open("w") as log:
        done = subprocess.run([sys.executable, "-c", LOGGING], stdout=log, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (75, "")


def test_checkpoints_that_are_gone_are_not_trained_again(tiny: TinyRun, quick: None) -> None:
    """The folder is there, its checkpoints were elsewhere. Another job, by somebody who removed them, may start over."""
    folder = tiny_leg(tiny, restart=0).folder
    row = {"event": "start", "job": "7", "chain": "7", "restart": 0, "progress": [0, 0]}
    append_row(tiny.run / "legs.jsonl", row)
    folder.require_checkpoints("7")
    append_row(tiny.run / "legs.jsonl", row | {"event": "end", "progress": [1, 60]})
    folder.require_checkpoints("8")
    with pytest.raises(DiskError, match="this job was at step 60 of stage 2"):
        folder.require_checkpoints("7")


def test_a_recipe_on_a_file_system_that_comes_back(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """`smol submit` puts it into the run folder."""
    real, times = Path.read_text, []

    def read_text(self: Path, *arguments: Any, **named: Any) -> str:
        if self == tiny.recipe and len(times) < 3:
            times.append(1)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return real(self, *arguments, **named)

    monkeypatch.setenv("ROOM_SECONDS", "60")
    monkeypatch.setattr(Path, "read_text", read_text)
    loaded = run_folder.patiently(lambda: load_recipe(tiny.recipe), print, lambda: False)
    assert loaded.name and len(times) == 3 and capsys.readouterr().out.count("waits") == 1
    with pytest.raises(UserError, match="no recipe file"):
        run_folder.patiently(lambda: load_recipe(tiny.folder / "nowhere.yaml"), print, lambda: False)


def test_a_full_disk_does_not_undo_what_is_done(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUN/slurm is a file, so that the mark has no place; it is not what makes a run done."""
    tiny.run.mkdir(parents=True)
    (tiny.run / "slurm").touch()
    leg = tiny_leg(tiny, restart=0)
    decision = leg_module.decide(leg_module.Evidence(0, finished=True))
    assert leg._end(decision, leg.folder.position()) == 0
    assert "could not be written" in capsys.readouterr().out
