"""Faults at random moments of a job under Slurm, and the clock beside them."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_smol.checkpoint.folder import WRITING
from tests.slurm.conftest import LONG, User, assert_nothing_lost
from tests.slurm.table import Trial
from tests.tiny import TinyRun, rows


def struck(
    user: User,
    whole: TinyRun,
    wanted: int,
    fault: Callable[[int], None],
    mend: Callable[[], None] = lambda: None,
    overrides: str = LONG,
) -> list[Trial]:
    """Do `fault` (it gets the job's id) `wanted` times to jobs one after the other. Every job then ends equal to the
    run that nothing happened to."""
    chance = random.Random(wanted)
    made: list[Trial] = []
    jobs = 0
    while len(made) < wanted:
        jobs += 1
        assert jobs <= 3 * wanted + 3, f"{len(made)} of {jobs} jobs noticed the fault: they are over too soon"
        job = user.submit(overrides=overrides, FUTILE_LEGS="100")
        while len(made) < wanted and random_moment(user, job, chance):
            strike = Strike.now(user, job)
            fault(job)
            trial = strike.followed(whole.run)
            mend()
            if trial is not None:
                made.append(trial)
        finish(user, job, whole)
        shutil.rmtree(user.run)
    return made


def to_nodes(
    user: User,
    whole: TinyRun,
    place: int,
    wanted: int,
    fault: Callable[[int], None],
    mend: Callable[[int], None],
    overrides: str = LONG,
) -> list[Trial]:
    """Faults of the job's node at `place`; the third node of the cluster is idle and takes over."""
    hit: list[int] = []

    def strike(job: int) -> None:
        hit.append(user.cluster.names(job)[place])
        fault(hit[-1])

    def heal() -> None:
        mend(hit[-1])
        user.until(lambda: user.cluster.up(hit[-1]), "node that is back")

    try:
        return struck(user, whole, wanted, strike, heal, overrides)
    finally:
        user.until(lambda: user.cluster.idle() == 3, "boot")


def random_moment(user: User, job: int, chance: random.Random) -> bool:
    """Wait, one time in three somewhere in the start of a leg, else within 25 steps; False: the run is over."""
    user.until(lambda: user.is_over(job) or user.ranks(job), "rank")
    if chance.random() < 1 / 3:
        time.sleep(chance.uniform(0, 6))
    else:
        wanted = user.lines() + chance.randint(1, 25)
        user.until(lambda: user.is_over(job) or user.lines() >= wanted, f"line {wanted}")
    return not user.is_over(job)


def until_saving(user: User, job: int) -> Path | None:
    """Wait for the next save to begin; the folder it writes into, or None when the run is over before."""
    checkpoints = user.run / "checkpoints"
    before, limit, looks = set(checkpoints.glob(f"{WRITING}*")), time.monotonic() + 120, 0  # of a killed leg
    while not (new := set(checkpoints.glob(f"{WRITING}*")) - before):
        looks += 1
        if looks % 500 == 0 and user.is_over(job):  # asking Slurm takes as long as a save of so small a model
            return None
        assert time.monotonic() < limit, f"no save in 120 s; the log: {user.log(job)[-3000:]}"
        time.sleep(0.001)
    return new.pop()


def finish(user: User, job: int, whole: TinyRun) -> None:
    ended = user.cluster.wait(job)
    assert ended["JobState"] == "COMPLETED", user.log(job)[-3000:]
    assert_nothing_lost(user, whole)


@dataclass
class Strike:
    """One fault done to a job: when, what the run had done by then, and what follows."""

    user: User
    job: int
    lines: int
    ends: int
    starts: int
    at: float

    @classmethod
    def now(cls, user: User, job: int) -> Strike:
        return cls(user, job, user.lines(), len(user.legs()), len(user.legs("start")), time.monotonic())

    def followed(self, whole: Path) -> Trial | None:
        """Wait for the verdict and the next leg (of this job, or in the same allocation). None: the run ended before
        the fault could do anything to it."""
        detected, state = None, ""

        def back() -> bool:
            nonlocal detected, state
            state = self.user.cluster.job(self.job)["JobState"]
            assert state not in ("FAILED", "CANCELLED"), self.user.log(self.job)[-3000:]
            if detected is None and (len(self.user.legs()) > self.ends or state != "RUNNING"):
                detected = time.monotonic() - self.at
            return state == "COMPLETED" or len(self.user.legs("start")) > self.starts

        self.user.until(back, "leg after the fault", seconds=300)
        if state == "COMPLETED":
            return None
        start = self.user.legs("start")[self.starts]
        return Trial(
            detected, time.monotonic() - self.at, max(0, self.lines - lines_at(whole, start["progress"]))
        )


def lines_at(run: Path, progress: list[int]) -> int:
    """Rows of metrics.jsonl up to a position (stage index, step)."""
    return sum([row["stage_index"], row["step"]] <= progress for row in rows(run / "metrics.jsonl"))
