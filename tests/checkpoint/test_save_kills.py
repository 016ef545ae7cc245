"""kill -9 of all ranks at random moments of a save: nothing that loads wrongly, and the run goes on bit-equal.

A few kills here; many, of a larger save:
    SAVE_KILLS=25 SAVE_HIDDEN=512 SAVE_SEED=1 python -m pytest -s tests/checkpoint/test_save_kills.py
"""

from __future__ import annotations

import collections
import multiprocessing as mp
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint import folder
from tests import ranks
from tests.checkpoint import saving_ranks
from tests.helpers import _rank, free_port, run_ranks

KILLS = int(os.environ.get("SAVE_KILLS", "2"))
HIDDEN = int(os.environ.get("SAVE_HIDDEN", "128"))
SEED = int(os.environ.get("SAVE_SEED", "7"))
STEPS = saving_ranks.EVERY * (2 * KILLS + 2)  # a late kill may come in the save after the one waited for


def start(where: Path, beside: bool) -> tuple[list[Any], Any]:
    """The ranks, and the queue that they hold on to."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    port, results, count = free_port(), context.Queue(), saving_ranks.LAYOUT.ranks
    arguments = (str(where), STEPS, HIDDEN, beside)
    started = [
        context.Process(
            target=_rank,
            args=(saving_ranks.training, arguments, rank, count, port, results),
            daemon=True,
        )
        for rank in range(count)
    ]
    for process in started:
        process.start()
    return started, results


def newest_request(where: Path) -> int:
    return max((int(path.name.removeprefix("asked-")) for path in where.glob("asked-*")), default=0)


def kill_in_a_save(where: Path, beside: bool, after: float) -> None:
    """Wait for the next save to be asked for, then so many seconds, and kill all ranks."""
    before, until = newest_request(where), time.monotonic() + 120
    started, _queue = start(where, beside)
    while newest_request(where) == before:
        assert time.monotonic() < until and all(process.is_alive() for process in started)
        time.sleep(0.001)
    time.sleep(after)
    for process in started:
        process.kill()  # SIGKILL; one may have ended by itself when the other was gone
    for process in started:
        process.join()


def phase(where: Path) -> str:
    """How far the save was when the ranks were killed."""
    writing = list(where.glob(f"{folder.WRITING}*"))
    if not writing:
        return "not begun, or published"
    names = {path.name for folder_ in writing for path in folder_.iterdir()}
    if folder.COMPLETE in names:
        return "complete, not renamed"
    if ".metadata" in names:
        return "metadata written"
    return "tensors" if any(name.endswith(".distcp") for name in names) else "folder made"


@pytest.mark.parametrize("beside", [True, False], ids=["beside training", "training waits"])
def test_kill_9_during_a_save_never_leaves_a_checkpoint_that_loads_wrongly(
    tmp_path: Path, beside: bool
) -> None:
    control, killed = tmp_path / "control", tmp_path / "killed"
    control.mkdir(), killed.mkdir()
    run_ranks(saving_ranks.training, 2, str(control), STEPS, HIDDEN, beside)
    expected = {one.step: ranks.stored_tensors(one.path) for one in folder.list_checkpoints(control)}
    assert sorted(expected) == list(range(2, STEPS + 1, 2))
    asked = {step: (control / f"asked-{step}").stat().st_mtime for step in expected}
    took = statistics.median(
        (control / folder.checkpoint_name("one", step)).stat().st_ctime - asked[step] for step in expected
    )

    moments, phases = random.Random(SEED), collections.Counter()
    for _ in range(KILLS):
        already = {one.step for one in folder.list_checkpoints(killed)}
        kill_in_a_save(killed, beside, moments.uniform(0, 1.1 * took))
        phases[phase(killed)] += 1
        published = folder.list_checkpoints(killed)
        assert already <= {one.step for one in published}, "what was there is there"
        for one in published:
            folder.verify_files(one.path)
            assert ranks.stored_tensors(one.path) == expected[one.step], one.path
        print(f"kill {sum(phases.values())}: {len(published)} whole, {phase(killed)}", flush=True)
    run_ranks(saving_ranks.training, 2, str(killed), STEPS, HIDDEN, beside)
    last = folder.choose_newest(killed)
    assert last is not None and ranks.stored_tensors(last.path) == expected[STEPS] == expected[last.step]
    assert not list(killed.glob(".*"))
    print(f"\n{KILLS} kills over {took:.2f} s of a save, seed {SEED}: {dict(phases)}")
