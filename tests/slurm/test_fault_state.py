"""What happens to the files and clocks of a run, under a real Slurm: checkpoints, disk, data, time, another shape."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.slurm.conftest import LONG, TWELVE, User
from tests.slurm.strikes import Strike, finish
from tests.slurm.table import FaultTable, Trial, trials
from tests.tiny import TinyRun
from tests.train.test_run import compare_to_rounding

pytestmark = [pytest.mark.slurm, pytest.mark.faults]

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "one bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "missing": lambda data: None,
}
KINDS = (
    "__0_0.distcp",
    ".metadata",
    "common.pt",
    "metadata.json",
    "state.json",
    "complete.json",
)
FAKE_CLOCK = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


def test_damaged_checkpoints(user: User, whole: TinyRun, table: FaultTable) -> None:
    """Every kind of file, damaged in every way between two legs: named, and the checkpoint before is used."""
    cases = list(product(KINDS, DAMAGES))
    random.Random(0).shuffle(cases)
    made = []
    for file, how in cases[: trials(len(cases))]:
        job = user.submit(overrides=LONG)
        user.until(lambda: len(list((user.run / "checkpoints").glob("two-*"))) >= 2, "second checkpoint")
        user.cancel(job)
        newest = max((user.run / "checkpoints").glob("two-*"))
        content = DAMAGES[how]((newest / file).read_bytes())
        (newest / file).unlink() if content is None else (newest / file).write_bytes(content)
        lines = user.lines()
        again = user.submit(overrides=LONG)
        finish(user, again, whole)
        log = user.log(again)
        assert "damaged checkpoint passed over" in log, (file, how, log)
        # A flipped bit of complete.json makes what it says of another file wrong, and that one is named.
        named = newest if (file, how) == ("complete.json", "one bit") else newest / file
        assert str(named) in log or f"{newest} has no {file}" in log, (file, how, log)
        resumed = next(line for line in log.splitlines() if "resumed from" in line)
        assert newest.name not in resumed, resumed
        made.append(
            Trial(None, None, lines - int(resumed.split("two-")[1][:8]) if "two-" in resumed else None)
        )
        shutil.rmtree(user.run)
    what = "one bit flipped in, truncated, emptied, removed: each kind of file of the newest checkpoint"
    table.add(what, "`damaged checkpoint passed over: FILE ...`", "equal, from the checkpoint before", made)


def test_full_disk(user: User, whole: TinyRun, table: FaultTable) -> None:
    """The file system of the run folder fills up between two saves; the next leg waits until it has room again."""
    folder, ballast = user.cluster.disk / "run", user.cluster.disk / "ballast"
    overrides = f"{LONG} run_dir={folder}"
    user.run = folder
    try:
        job = user.submit(overrides=overrides)
        user.until_line(22)
        strike = Strike.now(user, job)
        _fill(ballast, leave_bytes=100_000)
        trial = strike.followed(whole.run)
        user.until_logged(job, "the next checkpoints need")
        ballast.unlink()
        finish(user, job, whole)
    finally:
        ballast.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    log = user.log(job)
    assert "MB free and a checkpoint needs" in log and "earlier checkpoints are intact" in log
    assert trial is not None
    table.add(
        "disk of the run folder full",
        "`... has 0.1 MB free and a checkpoint needs ...`",
        "equal, once there is room",
        [trial],
    )


def _fill(path: Path, leave_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(bytes(shutil.disk_usage(path.parent).free - leave_bytes))


def test_vanished_shard(user: User, whole: TinyRun, table: FaultTable) -> None:
    """Cut short under the running job: it stops and is not requeued; restored and submitted again, it goes on."""
    data = user.folder / "web"
    shutil.copytree(whole.data / "web", data)
    overrides = f"{LONG} sources.web.path={data}"
    shard = next(data.glob("*.bin"))
    content = shard.read_bytes()
    job = user.submit(overrides=overrides)
    user.until_line(22)
    at = time.monotonic()
    with shard.open("r+b") as file:
        file.truncate(1000)
    ended = user.cluster.wait(job)
    detected = time.monotonic() - at
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "3:0"), user.log(job)[-3000:]
    assert f"{shard} has 1,000 bytes" in user.log(job)
    lines = user.lines()
    shard.write_bytes(content)
    again = user.submit(overrides=overrides)
    finish(user, again, whole)
    lost = lines - user.legs("start")[-1]["progress"][1]
    table.add(
        "data shard cut short",
        "`SHARD has 1,000 bytes, expected ...`",
        "FAILED with 3; restored and submitted again: equal",
        [Trial(detected, None, lost)],
    )


@pytest.mark.skipif(not Path(FAKE_CLOCK).exists(), reason="libfaketime is not installed")
def test_clock_jumps(user: User, whole: TinyRun, table: FaultTable) -> None:
    """The clock of one node goes an hour forward, then two back; nothing is decided by it."""
    clock = user.folder / "clock"
    clock.write_text("+0\n")
    other = user.folder / "clock.node2"
    other.write_text("+0\n")
    user.cluster.on_node(2, "mount", "--bind", str(other), str(clock))
    fake = f"LD_PRELOAD={FAKE_CLOCK},FAKETIME_TIMESTAMP_FILE={clock},FAKETIME_NO_CACHE=1,FAKETIME_DONT_FAKE_MONOTONIC=1"
    try:
        job = user.submit(f"--export=ALL,{fake}", "--nodelist=node1,node2", overrides=LONG)
        for lines, shift in ((15, "+3600"), (40, "-3600")):
            user.until_line(lines)
            other.write_text(f"{shift}\n")
        finish(user, job, whole)
    finally:
        user.cluster.on_node(2, "umount", str(clock))
        for node in (1, 2):  # what the false clock leaves behind, not the job
            user.cluster.on_node(node, "sh", "-c", "rm -f /dev/shm/*faketime*")
    assert len(user.legs()) == 1, user.log(job)[-3000:]
    table.add(
        "clock of one node an hour forward, then two hours back",
        "nothing: no decision depends on it",
        "equal",
        [Trial(None, None, 0)] * 2,
    )


def test_elastic(user: User, whole_of_twelve: TinyRun, table: FaultTable) -> None:
    """Four ranks, two, three, then two by two: the same documents in the same order, the loss to rounding."""
    shapes = [
        ("--nodes=2", "--ntasks-per-node=2", ""),
        ("--nodes=2", "--ntasks-per-node=1", ""),
        ("--nodes=3", "--ntasks-per-node=1", ""),
        ("--nodes=2", "--ntasks-per-node=2", "parallel.tp=2"),
    ]
    made = []
    for number, (nodes, tasks, layout) in enumerate(shapes):
        job = user.submit(nodes, tasks, overrides=f"{TWELVE} {layout}")
        if number < len(shapes) - 1:
            user.until_line(15 * (number + 1))
            user.cancel(job)
            made.append(Trial(None, None, 0))
    assert user.cluster.wait(job)["JobState"] == "COMPLETED", user.log(job)[-3000:]
    compare_to_rounding(user.run, whole_of_twelve.run)
    table.add(
        "restarted on 4, 2, 3 ranks, then 2 x 2 (tensor parallel)",
        "`resumed from ...`",
        "same rows in the same steps, loss to rounding",
        made,
    )
