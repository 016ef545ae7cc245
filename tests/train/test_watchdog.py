"""Ranks that stand still, run away with the interpreter's lock or fall behind: named, ended, and the run goes on."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.recipe.schema import Guard
from megatron_smol.train.heartbeat import Beat, Verdict, judge, read_beats, write_beat
from megatron_smol.train.lock import Claim
from megatron_smol.train.pulse import COMPUTING, LOADING, UPDATING, Pulse
from megatron_smol.train.stragglers import Streaks
from megatron_smol.train.watchdog import VERDICT_SECONDS, Watchdog
from tests.tiny import TinyRun, rows
from tests.train.faulty import Fault, ended, errors, incidents, launch, run

SHORT = ("eval.windows_per_source=0",)
LONG = (*SHORT, "stages.two.until=4000 steps", "save.every=1000 steps")
WATCHED = ("guard.step_timeout=4",)


def until_line(tiny: TinyRun, lines: int, seconds: float = 240) -> None:
    metrics, end = tiny.run / "metrics.jsonl", time.monotonic() + seconds
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
        assert time.monotonic() < end, errors(tiny)
        time.sleep(0.05)


def hung(tiny: TinyRun, what: str = "hang") -> dict[str, Any]:
    """The one row that tells of the hang."""
    (row,) = [row for row in incidents(tiny) if row["decision"] == "restart"]
    assert row["reason"] in (tiny.run / "log.txt").read_text() and row["what"] == what
    return row


def test_a_rank_that_is_gone_is_named(tiny: TinyRun) -> None:
    """The other one fails in a collective, and says whom it waited for."""
    codes = run(tiny, *SHORT, faults=(Fault("kill", "two", 8),))
    assert codes[1] == -9 and codes[0] != 0, errors(tiny)
    assert [entry["rank"] for entry in hung(tiny, "lost rank")["ranks"]] == [1]


def test_a_stopped_rank_is_named_and_ended(tiny: TinyRun) -> None:
    """SIGSTOP, as a frozen node does it: the rank can neither answer nor leave by itself."""
    processes = launch(tiny, *LONG, *WATCHED)
    until_line(tiny, 9)
    os.kill(processes[1].pid, signal.SIGSTOP)
    codes = ended(processes, 90)
    assert codes == [75, -9], errors(tiny)
    row = hung(tiny)
    assert [(entry["rank"], entry["host"]) for entry in row["ranks"]] == [(1, os.uname().nodename)]
    assert "it does not answer" in row["reason"] and row["step"] >= 9
    assert "_train_watched" in (tiny.run / "watchdog" / "rank-00000.txt").read_text(), "stacks of who waited"


def test_a_rank_that_does_not_come_is_named_with_its_place(tiny: TinyRun) -> None:
    """A loop in Python inside the forward pass; the others wait in a collective."""
    assert run(tiny, *SHORT, *WATCHED, faults=(Fault("busy", "two", 8),)) == [75, 75]
    row = hung(tiny)
    assert [(entry["rank"], entry["step"], entry["phase"]) for entry in row["ranks"]] == [
        (1, 8, "forward and backward")
    ]
    assert "faulty.py" in (tiny.run / "watchdog" / "rank-00001.txt").read_text()
    assert "rank 1 is at" in (tiny.run / "log.txt").read_text()
    assert run(tiny, *SHORT, *WATCHED) == [0, 0], errors(tiny)
    assert rows(tiny.run / "metrics.jsonl")[-1]["step"] == 13, "the same command goes on"


@pytest.mark.faults
def test_a_rank_that_sleeps_in_the_loader_is_named(tiny: TinyRun) -> None:
    asleep = Fault("asleep", "two", 8, value=1000, place="reading a batch")
    began = time.monotonic()
    assert run(tiny, *SHORT, *WATCHED, faults=(asleep,)) == [75, 75]
    print(f"\nall over {time.monotonic() - began:.0f} s after the start")
    assert [(entry["rank"], entry["phase"]) for entry in hung(tiny)["ranks"]] == [(1, "loading data")]


def test_a_rank_that_holds_the_interpreters_lock_is_named(tiny: TinyRun) -> None:
    """A call into C that never returns and never lets go: not even its own watchdog runs."""
    codes = run(tiny, *SHORT, *WATCHED, faults=(Fault("lock", "two", 8),))
    assert codes == [75, -9], errors(tiny)
    (culprit,) = hung(tiny)["ranks"]
    assert culprit["rank"] == 1


def test_a_collective_that_times_out_names_who_did_not_come(tiny: TinyRun) -> None:
    """gloo's error comes before the watchdog's time: the exit code is an error's, and the rank is named all the same."""
    # Long enough for a busy machine: a rank that is only slow to come must not end the run before the one that is stopped.
    patient = ("guard.collective_timeout=20", "guard.step_timeout=300")
    processes = launch(tiny, *LONG, *patient)
    until_line(tiny, 9)
    os.kill(processes[1].pid, signal.SIGSTOP)
    try:
        assert ended(processes[:1], 120) == [1]
    finally:  # a stopped process ends by nothing else, and pytest would wait for it
        processes[1].kill()
        processes[1].join()
    assert [entry["rank"] for entry in hung(tiny, "lost rank")["ranks"]] == [1], "it does not answer"
    assert "Timed out" in errors(tiny)


@pytest.mark.parametrize("other", ["gone", "frozen", "new"])
def test_a_rank_that_thaws_when_a_later_start_has_the_run_tells_of_no_hang(tiny: TinyRun, other: str) -> None:
    """Its peers are gone, do not answer, or are the later start's, which moves on; the run that goes on is another one."""
    processes = launch(tiny, *LONG, *WATCHED)
    until_line(tiny, 9)
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    (tiny.run / ".lock").write_text("job 7, start 1.0, process 1 on node9")
    if other == "gone":
        processes[0].kill()
    beats = tiny.run / "watchdog"
    beat, until = read_beats(beats, 1)[0], time.monotonic() + 90
    os.kill(processes[1].pid, signal.SIGCONT)
    while processes[1].is_alive() and time.monotonic() < until:
        if other == "new":
            beat = replace(beat, beat=beat.beat + 1, step=beat.step + 1)
            write_beat(beats, beat)
        processes[1].join(0.1)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes[1] == 7, (codes, errors(tiny))
    assert [row for row in incidents(tiny) if row["decision"] == "restart"] == []


def test_slow_is_not_hanging(tiny: TinyRun) -> None:
    """A step within its time, much longer than the others, and a start that takes longer than a step may."""
    asleep = Fault("asleep", "two", 10, value=2.0, once=True)
    assert run(tiny, *SHORT, *WATCHED, faults=(asleep,)) == [0, 0], errors(tiny)
    assert not incidents(tiny)


def test_a_straggler_is_named(tiny: TinyRun) -> None:
    few = ("guard.straggler_every=1", "stages.one.until=2 steps", "stages.two.until=14 steps")
    few += ("stages.anneal.from.before_end=0 steps",)
    assert run(tiny, *SHORT, *few, faults=(Fault("slow", "two", 8, value=0.5),)) == [0, 0], errors(tiny)
    # A busy machine makes stragglers of its own; the planted one is there whatever the others do.
    row = next(row for row in incidents(tiny) if row["rank"] == 1)
    assert (row["what"], row["host"]) == ("straggler", os.uname().nodename)
    assert row["stage"] == "two" and row["step"] >= 4, "after four comparisons"
    log = (tiny.run / "log.txt").read_text()
    assert "!! rank 1 on" in log
    assert "own part of a step: median rank" in log, "the summary at the end"


@pytest.mark.faults
@pytest.mark.parametrize(("share", "named"), [(0.3, True), (0.05, False), (0.0, False)])
def test_how_slow_is_slow(tiny: TinyRun, share: float, named: bool) -> None:
    """Both ranks take 0.2 s a step; one takes 30 % more (named within 20 steps), 5 % more (in the summary), nothing more
    (200 steps without an alarm)."""
    steps = 200 if share == 0 else 30
    shape = (
        *SHORT,
        "stages.one.until=2 steps",
        f"stages.two.until={2 + steps} steps",
        "save.every=1000 steps",
    )
    shape += ("stages.anneal.from.before_end=0 steps", "stages.long.from.before_end=0 steps")
    slow = [Fault("slow", "two", 1000, rank=rank, value=0.1 * (1 + share * rank)) for rank in range(2)]
    assert run(tiny, *shape, faults=tuple(slow)) == [0, 0], errors(tiny)
    found = [(row["rank"], row["step"]) for row in incidents(tiny) if row["stage"] == "two"]
    assert found == ([(1, 2 + 20)] if named else [])
    summary = (tiny.run / "log.txt").read_text().splitlines()[-2]
    print(f"\n{summary}")
    assert share == 0 or "rank 1 on" in summary


SLOW, USUAL = [0.1, 0.1, 0.19, 0.1], [0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("comparisons", "named"),
    [
        ([SLOW] * 10, [(3, [2])]),
        ([SLOW] * 3 + [USUAL] + [SLOW] * 3, []),
        ([SLOW] * 4 + [USUAL] * 3 + [SLOW] * 4, [(3, [2])]),
        ([SLOW] * 4 + [USUAL] * 4 + [SLOW] * 4, [(3, [2]), (11, [2])]),
        ([[0.1, 0.1, 0.1, 0.14]] * 10, []),
        ([[0.001, 0.001, 0.008, 0.001]] * 10, []),
    ],
    ids=["once", "three in a row", "not yet forgotten", "named again", "below the factor", "the system's"],
)
def test_who_is_a_straggler(comparisons: list[list[float]], named: list[tuple[int, list[int]]]) -> None:
    streaks = Streaks(4, factor=1.5)
    assert [(i, new) for i, each in enumerate(comparisons) if (new := streaks.newly_slow(each))] == named


def test_the_save_file_asks_for_one_checkpoint(tiny: TinyRun) -> None:
    processes = launch(tiny, *LONG, ranks=1)
    until_line(tiny, 9)
    (tiny.run / "save").touch()
    try:
        end = time.monotonic() + 240
        while not (found := list((tiny.run / "checkpoints").glob("two-*"))):
            assert time.monotonic() < end and processes[0].is_alive(), errors(tiny)
            time.sleep(0.05)
        assert not (tiny.run / "save").exists()
        lines = len((tiny.run / "metrics.jsonl").read_text().splitlines())
        until_line(tiny, lines + 5)
        assert list((tiny.run / "checkpoints").glob("two-*")) == found, "one, and training goes on"
    finally:
        processes[0].kill()
        processes[0].join()


def beat(rank: int, count: int = 5, step: int = 7, phase: str = COMPUTING, waiting: bool = True) -> Beat:
    return Beat(rank, f"n{rank}", 100 + rank, 1, count, 0, step, phase, 30.0, "step.py:1 x", waiting)


def later(beats: dict[int, Beat], **ranks: int) -> dict[int, Beat]:
    """The same ranks, beats grown, except where a count is given (`r2=0`: stands still)."""
    return {r: replace(b, beat=b.beat + ranks.get(f"r{r}", 3)) for r, b in beats.items()}


def test_who_does_not_answer_comes_first() -> None:
    beats = {rank: beat(rank) for rank in range(4)} | {3: beat(3, phase=LOADING)}
    verdict = judge(beats, later(beats, r0=0, r2=0))
    assert [b.rank for b in verdict.lagging] == [0, 2] and verdict.teller == 1 and not verdict.moving


@pytest.mark.parametrize(
    "odd",
    [beat(2, step=6, phase=UPDATING), beat(2, phase=LOADING), beat(2, waiting=False)],
    ids=["a step behind", "a phase behind", "not waiting"],
)
def test_who_is_behind(odd: Beat) -> None:
    beats = {rank: beat(rank) for rank in range(4)} | {2: odd}
    verdict = judge(beats, later(beats))
    assert [b.rank for b in verdict.lagging] == [2] and verdict.teller == 0


def test_nobody_is_named_where_nobody_differs_and_nothing_is_said_of_ranks_that_move() -> None:
    beats = {rank: beat(rank) for rank in range(3)}
    assert judge(beats, later(beats)).lagging == ()
    moved = later(beats) | {1: replace(beat(1), beat=9, step=8)}
    assert judge(beats, moved).moving


def test_the_verdict_may_take_longer_than_the_last_resort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 ranks read 256 files each: on a slow file system longer than the timer that ends a rank whose thread is stuck."""
    armed: list[float] = []
    claim = Claim(tmp_path, "")
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    watchdog = Watchdog(tmp_path, 0, 256, Pulse(), Guard(step_timeout=1), claim)

    def look_around() -> Verdict:
        assert armed == [VERDICT_SECONDS]
        return Verdict((), "", moving=True, silent=(), teller=0)

    monkeypatch.setattr(watchdog, "_look_around", look_around)
    with (tmp_path / "stacks").open("a") as watchdog._stacks:
        watchdog._alarm()
    assert armed


def test_waiting_for_a_batch_is_part_of_the_step(tiny: TinyRun) -> None:
    """Tokens/s of slow storage are not those of fast storage. (What is read ahead hides some steps of it.)"""
    asleep = Fault("asleep", "two", 8, rank=0, value=3.0, place="reading a batch")
    assert run(tiny, *SHORT, faults=(asleep,)) == [0, 0], errors(tiny)
    seconds = [json.loads(line)["seconds"] for line in (tiny.run / "metrics.jsonl").read_text().splitlines()]
    assert sum(took > 1.4 for took in seconds) == 1, seconds
