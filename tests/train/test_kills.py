"""Two ranks of a real run, killed or stopped wherever it may happen: the same command ends bit-equal to the run that
nothing happened to. (The same under Slurm: tests/slurm.)

    KILLS=200 python -m pytest -s -m faults tests/train/test_kills.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint.folder import list_checkpoints
from tests.slurm.strikes import lines_at
from tests.tiny import TinyRun, rows, write_recipe
from tests.train.faulty import PLACES, Fault, ended, errors, launch, run
from tests.train.test_run import weights_of

KILLS = int(os.environ.get("KILLS", "20"))
EVERY = 2  # steps from save to save in the tiny recipe
WAITED: list[int] = []  # ranks that had to be ended
RARELY = "save.every=1000 steps"


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = fresh(tiny_data, tmp_path_factory.mktemp("whole"))
    assert run(made) == [0, 0], errors(made)
    return made


def fresh(data: Path, folder: Path) -> TinyRun:
    folder.mkdir(exist_ok=True)
    return TinyRun(write_recipe(data, folder), data, folder)


def assert_equal(tiny: TinyRun, whole: TinyRun) -> None:
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert rows(tiny.run / name) == rows(whole.run / name)
    assert weights_of(tiny.run) == weights_of(whole.run)
    assert (tiny.run / "ledger.json").read_text() == (whole.run / "ledger.json").read_text()


def kill_in(tiny: TinyRun, whole: TinyRun, kills: list[Fault], *overrides: str) -> None:
    """Each in a leg of its own, which goes on where the one before was killed."""
    for kill in kills:
        codes = run(tiny, *overrides, faults=(kill,))
        assert codes[kill.rank] == -signal.SIGKILL, (kill, codes, errors(tiny))
        assert codes[1 - kill.rank] != 0 or kill.place == "the end", "nobody stays behind"
    assert run(tiny, *overrides) == [0, 0], errors(tiny)
    assert_equal(tiny, whole)


def test_kill_9_while_a_checkpoint_is_written_and_loaded(tiny: TinyRun, whole: TinyRun) -> None:
    places = ("writing a save", "publishing", "loading")
    kill_in(tiny, whole, [Fault("kill", rank=0, place=place) for place in places])


@pytest.mark.faults
@pytest.mark.parametrize("trial", range(5))
def test_kill_9_in_every_named_place(tiny: TinyRun, whole: TinyRun, trial: int) -> None:
    chance = random.Random(trial)
    places = ["looking for a checkpoint", "publishing", *PLACES]
    kill_in(tiny, whole, [Fault("kill", rank=PLACES[p].rank(chance), place=p) for p in places])


@pytest.mark.faults
@pytest.mark.parametrize("place", ["copying for a save", "writing a save", "publishing"])
def test_kill_9_in_the_last_save(tiny: TinyRun, whole: TinyRun, place: str) -> None:
    """Saves are rare: the only one after the last step is the run's last."""
    kill_in(tiny, whole, [Fault("kill", "long", 13, rank=0, place=place)] * 5, RARELY)


@pytest.mark.faults
def test_kill_9_during_the_imports(tiny: TinyRun, whole: TinyRun) -> None:
    """Of the real command, which the ranks above are spared."""
    for tenth in range(1, 31, 6):
        process = tiny.start(ranks=2)
        time.sleep(tenth / 10)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert tiny.train(ranks=2).returncode == 0
    assert_equal(tiny, whole)


@pytest.mark.faults
@pytest.mark.parametrize("victims", ["one rank", "all ranks", "the launcher"])
def test_kill_9_at_random_moments(tiny_data: Path, tmp_path: Path, whole: TinyRun, victims: str) -> None:
    """KILLS of them, in as many runs as it takes; each run ends equal, and nothing outlives it."""
    chance, lost, kills, runs = random.Random(victims), [], 0, 0
    while kills < KILLS:
        runs += 1
        tiny = fresh(tiny_data, tmp_path / str(runs))
        while kills < KILLS and (killed := killed_leg(tiny, whole, victims, chance)) is not None:
            lost.append(killed)
            kills += 1
        assert run(tiny) == [0, 0], errors(tiny)
        assert_equal(tiny, whole)
    print(
        f"\n{kills} kills of {victims}, {runs} runs, each equal; steps lost: most {max(lost)}; {len(WAITED)} ranks ended by the launcher"
    )
    assert max(lost) <= 2 * EVERY, "the last save was done, or the one before and the last was under way"


def killed_leg(tiny: TinyRun, whole: TinyRun, victims: str, chance: random.Random) -> int | None:
    """Start, kill, wait until nothing is left: the steps that the next leg must repeat. None: it had ended before."""
    launcher = tiny.start(ranks=2) if victims == "the launcher" else None
    processes: list[Any] = [launcher] if launcher else launch(tiny)
    if launcher:
        wait_until(lambda: len(children(launcher.pid)) == 2, "the ranks")
        time.sleep(0.5)  # Python starts
    random_moment(tiny, processes, chance)
    ranks = children(launcher.pid) if launcher else [process.pid for process in processes]
    assert not [child for rank in ranks for child in children(rank)], (
        "ranks have no helpers to be left behind"
    )
    over = list(map(code, processes))
    for process in processes if victims != "one rank" else [chance.choice(processes)]:
        process.kill()
    if launcher:
        launcher.wait()
        wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), "end of the ranks")
    else:
        as_the_launcher_would(processes)
    if None not in over:
        return None
    published = list_checkpoints(tiny.run / "checkpoints")
    return max(0, lines_of(tiny) - (lines_at(whole.run, list(published[-1].progress)) if published else 0))


def random_moment(tiny: TinyRun, processes: list[Any], chance: random.Random) -> None:
    """One time in three somewhere in the start, else within the next six steps."""
    if chance.random() < 1 / 3:
        time.sleep(chance.uniform(0, 3))
        return
    wanted = lines_of(tiny) + chance.randint(1, 6)
    wait_until(lambda: lines_of(tiny) >= wanted or None not in map(code, processes), f"line {wanted}", 240)
    time.sleep(chance.uniform(0, 0.1))


def code(process: Any) -> int | None:
    """Of a rank, or of a launcher; None while it runs."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def lines_of(tiny: TinyRun) -> int:
    metrics = tiny.run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def as_the_launcher_would(processes: list[Any]) -> None:
    """srun --wait=30: who does not follow the killed one by itself (it waits for it to meet, say) is ended."""
    until = time.monotonic() + 30
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
        if process.exitcode is None:
            WAITED.append(process.pid)
            process.kill()
            process.join()


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"no {what} after {seconds} s"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.faults
def test_stopped_after_every_step(tiny: TinyRun, tiny_data: Path, tmp_path: Path) -> None:
    """A signal in each step, through stage ends, a branch, and the ends of an epoch: the run goes on from each."""
    small = (
        "data.holdout_tokens=20000",
        "eval.windows_per_source=1",
    )  # 15 windows of web are left: three epochs
    other = fresh(tiny_data, tmp_path / "other")
    assert run(other, *small) == [0, 0], errors(other)
    for row in rows(other.run / "metrics.jsonl"):
        stop = Fault("signal", row["stage"], row["step"], rank=row["step"] % 2, value=0.0)
        codes = run(tiny, *small, faults=(stop,))
        is_last = (row["stage"], row["step"]) == ("long", 13)
        assert codes == ([0, 0] if is_last else [75, 75]), (row["stage"], row["step"], codes, errors(tiny))
    assert_equal(tiny, other)


def test_two_signals_during_a_save(tiny: TinyRun, whole: TinyRun) -> None:
    """The save under way is finished, the step of the signal is saved too, and the code asks for a restart."""
    faults = (Fault("signal", rank=0, place="writing a save", value=1.0),)
    assert run(tiny, faults=faults) == [75, 75], errors(tiny)
    last = rows(tiny.run / "metrics.jsonl")[-1]
    assert (tiny.run / f"checkpoints/{last['stage']}-{last['step']:08d}/complete.json").is_file()
    assert run(tiny) == [0, 0], errors(tiny)
    assert_equal(tiny, whole)


EXCEPTIONS = ["building the model", "validation", "writing a save"]


@pytest.mark.parametrize(
    "place", ["a step", *(pytest.param(p, marks=pytest.mark.faults) for p in EXCEPTIONS)]
)
def test_an_exception_on_one_rank_ends_all(tiny: TinyRun, place: str) -> None:
    """The other rank does not wait for ever, and the first rank's traceback is the cause."""
    processes = launch(tiny, faults=(Fault("raise", rank=1, place=place),))
    wait_until((tiny.folder / f"hit-{place}").exists, place, 120)
    struck = time.monotonic()
    codes = ended(processes, 60)
    print(f"\nboth ranks gone {time.monotonic() - struck:.1f} s after an exception in '{place}'")
    assert 0 not in codes and 75 not in codes, codes
    assert f"planted in {place}" in (tiny.folder / "error-1.txt").read_text()
    if place == "writing a save":
        assert codes == [4, 4] and "earlier checkpoints are intact" in errors(tiny)


def test_a_disk_without_room_for_a_row_is_tried_again(tiny: TinyRun, whole: TinyRun) -> None:
    """Code 6: a restart may find room, and the decision is not left to a person at once."""
    full = Fault("full disk", "two", 9, rank=0, place="writing a row")
    codes = run(tiny, faults=(full,))
    assert codes[0] == 6 and codes[1] not in (0, 2, 3, 5), (codes, errors(tiny))
    assert "No space left on device" in errors(tiny)
    assert run(tiny) == [0, 0], errors(tiny)
    assert_equal(tiny, whole)


def test_ranks_that_do_not_divide_the_batch_leave_the_run_alone(tiny: TinyRun) -> None:
    """Two ranks, then three with a batch of eight."""
    assert run(tiny, faults=(Fault("signal", "one", 3, value=0.0),)) == [75, 75], errors(tiny)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tiny.run.rglob("*")}
    assert run(tiny, ranks=3) == [2, 2, 2]
    assert "3 data-parallel ranks cannot share evenly; allowed: 1, 2, 4" in errors(tiny)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tiny.run.rglob("*")} == before
