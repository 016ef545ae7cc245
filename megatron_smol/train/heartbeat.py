"""RUN/watchdog: what each rank says of itself, and the verdict on who keeps the others waiting.

    rank-00003.json   written every second or so by a thread of that rank (train/watchdog.py)
    rank-00003.txt    Python stacks of its hangs

Files, because they can be read when the rank cannot answer and when no collective works. Ages are not trusted (clocks
differ): a rank is alive when its `beat` grows between two looks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_smol.train.pulse import PHASES

FOLDER = "watchdog"
BEAT_BYTES, WHERE_CHARACTERS = 2048, 400


@dataclass(frozen=True)
class Beat:
    """A rank's word about its main thread. where: its innermost frames; waiting: they are inside a collective."""

    rank: int
    host: str
    pid: int
    started: int  # of the process, in clock ticks since boot: tells it from a later one with the same pid
    beat: int
    stage_index: int
    step: int
    phase: str
    seconds: float  # in this phase
    where: str = ""
    waiting: bool = False

    @property
    def place(self) -> tuple[int, int, int]:
        """Earlier is smaller."""
        return self.stage_index, self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host}: step {self.step + 1}, {self.phase}, for {self.seconds:.0f} s"
        )

    @property
    def last_heard(self) -> str:
        """The same of a rank that may have come further since."""
        return f"rank {self.rank} on {self.host}: last heard of in step {self.step + 1}, {self.phase}"


@dataclass(frozen=True)
class Verdict:
    """Who keeps the others waiting, and why we think so; `moving`: nobody hangs. teller: the rank that reports."""

    lagging: tuple[Beat, ...]
    why: str
    moving: bool
    silent: tuple[Beat, ...]
    teller: int


def beat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def write_beat(folder: Path, beat: Beat) -> None:
    """In one write over the last one, of the same size. A renamed file would be seen late: NFS remembers folders."""
    text = json.dumps(asdict(beat)).encode()
    descriptor = os.open(beat_path(folder, beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.ljust(BEAT_BYTES), 0)
    finally:
        os.close(descriptor)


def read_beats(folder: Path, world: int) -> dict[int, Beat]:
    """Of the ranks that have written one."""
    found = {}
    for rank in range(world):
        try:
            found[rank] = Beat(**json.loads(beat_path(folder, rank).read_text()))
        except (OSError, ValueError, TypeError):
            continue
    return found


def judge(first: Mapping[int, Beat], second: Mapping[int, Beat]) -> Verdict:
    """From two looks, some beats apart: the first of these that tells ranks apart.

    A rank whose beat stands still is stopped, holds the interpreter's lock, or is gone with its node. Of the
    others the one that is in an earlier step or phase lags, or else the one that is not inside a collective, in which the
    others wait for it.
    """
    silent = tuple(beat for rank, beat in second.items() if rank in first and first[rank].beat == beat.beat)
    alive = [beat for beat in second.values() if beat not in silent]
    teller = min((beat.rank for beat in alive), default=0)
    moving = any(rank in first and first[rank].place != beat.place for rank, beat in second.items())
    if silent:
        why = "it does not answer: stopped, stuck outside Python, or gone with its node"
        return Verdict(silent, why, moving, silent, teller)
    earliest = min((beat.place for beat in alive), default=(0, 0, 0))
    behind = [beat for beat in alive if beat.place == earliest]
    if len(behind) < len(alive):
        return Verdict(tuple(behind), "the others are further", moving, silent, teller)
    working = [beat for beat in alive if not beat.waiting]
    if 0 < len(working) < len(alive):
        return Verdict(tuple(working), "the others wait in a collective", moving, silent, teller)
    return Verdict((), "all ranks are in the same place", moving, silent, teller)


def said(verdict: Verdict, most: int = 4) -> str:
    """The ranks that keep the others waiting, in words; "all ranks" where none can be told from the others."""
    beats = verdict.lagging
    shown = "; ".join(beat.last_heard if beat in verdict.silent else str(beat) for beat in beats[:most])
    return (shown or "all ranks") + (f"; and {len(beats) - most} more" if len(beats) > most else "")
