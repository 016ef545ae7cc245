"""Does to one job, at random moments, what clusters do, and keeps a journal of it.

Faults overlap as they like: a node may still boot when the network of the next one is cut. Nothing here helps the
run: nodes come back, links are mended and disks have room again by themselves, jobs are never submitted twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_smol.checkpoint.folder import list_checkpoints
from megatron_smol.slurm.legs import last_rows
from tests.slurm.conftest import User

# A gap between two steps that is longer is no step, but a start, a hang, or a wait in the queue.
DOWN_SECONDS = 2.0
POLL_SECONDS = 0.1


@dataclass
class Punisher:
    """`work()` for some hours; then `account()` says what became of the time."""

    user: User
    job: int
    chance: random.Random
    journal: Path
    apart: tuple[float, float] = (60, 120)  # seconds between two faults
    done: Counter[str] = field(default_factory=Counter)
    hurt: set[int] = field(default_factory=set)  # nodes without power or network
    mends: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    seen: list[tuple[float, int]] = field(default_factory=list)  # (seconds, step) at each new metrics row
    began: float = field(default_factory=time.monotonic)

    @property
    def faults(self) -> dict[str, Callable[[], bool]]:
        """Each does something now and says whether there was something to do it to."""
        return {
            "kill -9 of a rank": lambda: self._signal_rank(signal.SIGKILL),
            "a rank stopped (SIGSTOP)": lambda: self._signal_rank(signal.SIGSTOP),
            "power loss of a node": self._cut_power,
            "network of a node cut": self._cut_link,
            "preemption": self._preempt,
            "USR1": self._usr1,
            "disk full for 20 s": self._fill_disk,
            "a bit of the newest checkpoint flipped, then kill -9": self._flip_and_kill,
        }

    def work(self, seconds: float) -> None:
        """Punish for so long, or until the job has ended, and mend what is still broken."""
        due = self._later()
        look = 0.0
        while (now := time.monotonic()) < self.began + seconds:
            self._watch(now)
            self._mend(now)
            if now > due:
                due = self._later() if self._punish() else now + 1
            if now > look:
                look = now + 2
                if self.user.is_over(self.job):
                    break
            time.sleep(POLL_SECONDS)
        self._mend(float("inf"))

    def account(self) -> dict[str, Any]:
        """Seconds and shares. effective: steps of the run x the time of an undisturbed one, over all of the time.
        bound: the share that was left by detection, requeue, boots, imports and loads (gaps between steps)."""
        pairs = list(zip(self.seen, self.seen[1:], strict=False))
        gaps = [after[0] - before[0] for before, after in pairs]
        down = self.seen[0][0] + sum(gap for gap in gaps if gap > DOWN_SECONDS)
        again = sum(max(0, before[1] - after[1] + 1) for before, after in pairs if after[1] <= before[1])
        forward = [
            (after[0] - before[0]) / (after[1] - before[1])
            for before, after in pairs
            if after[1] > before[1] and after[0] - before[0] <= DOWN_SECONDS
        ]
        step_s, elapsed, steps = statistics.mean(forward), self.seen[-1][0], self.seen[-1][1]
        effective, bound = steps * step_s / elapsed, 1 - down / elapsed
        return {
            "seconds": round(elapsed),
            "faults": dict(sorted(self.done.items())),
            "steps": steps,
            "steps_again": again,
            "step_seconds": round(step_s, 4),
            "down_seconds": round(down),
            "effective": round(effective, 4),
            "bound": round(bound, 4),
            "effective_of_bound": round(effective / bound, 4),
        }

    # -- what it does ----------------------------------------------------------------------------------------

    def _punish(self) -> bool:
        name = self.chance.choice(list(self.faults))
        if not self.faults[name]():
            return False
        self.done[name] += 1
        self._note(fault=name)
        return True

    def _signal_rank(self, number: signal.Signals) -> bool:
        if not (ranks := self._ranks()):
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(ranks), number)
        return True

    def _cut_power(self) -> bool:
        """Until after Slurm has noticed (it waits 10 s here). Five times sooner, on the batch host, and it holds the job for good."""
        return self._hurt(self.user.cluster.cut_power, self.user.cluster.boot, self.chance.uniform(30, 60))

    def _cut_link(self) -> bool:
        """For less than Slurm's node timeout, and nothing but the link is mended; or for longer, and the node comes back
        as a fenced one does, by a reboot. (Just linked again it would meet its own old step daemon, which tells its end
        for a minute: this cluster requeues after 5 s, real ones after 120.)"""
        seconds = self.chance.choice([self.chance.uniform(2, 6), self.chance.uniform(30, 60)])

        def fence(node: int) -> None:
            self.user.cluster.cut_power(node)
            self.user.cluster.boot(node)

        heal = self.user.cluster.mend_link if seconds < 10 else fence
        return self._hurt(self.user.cluster.cut_link, heal, seconds)

    def _hurt(self, fault: Callable[[int], None], heal: Callable[[int], None], seconds: float) -> bool:
        nodes = [node for node in self._nodes() if node not in self.hurt]
        if not nodes:
            return False
        node = self.chance.choice(nodes)
        self.hurt.add(node)
        fault(node)

        def mend() -> None:
            heal(node)
            self.hurt.discard(node)

        self._in(seconds, mend)
        return True

    def _preempt(self) -> bool:
        up = self.user.cluster.nodes - len(self.hurt)
        if up < 2 or not self._nodes():
            return False
        self.user.cluster.sbatch(
            "-p", "urgent", f"--nodes={up}", "--exclusive", f"--chdir={self.user.folder}", "--wrap", "sleep 3"
        )
        return True

    def _usr1(self) -> bool:
        if not self._ranks():
            return False
        self.user.cluster.usr1(self.job)
        return True

    def _fill_disk(self) -> bool:
        """To the last byte, or so that lines of text still fit and a checkpoint does not."""
        ballast = self.user.cluster.disk / "ballast"
        if ballast.exists():
            return False
        free = shutil.disk_usage(ballast.parent).free - self.chance.choice([0, 100_000])
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            for _ in range(free >> 16):
                file.write(bytes(1 << 16))
            file.write(bytes(free & 0xFFFF))
        self._in(20, ballast.unlink)
        return True

    def _flip_and_kill(self) -> bool:
        published = list_checkpoints(self.user.run / "checkpoints")
        if not published or not self._ranks():
            return False
        files = [path for path in sorted(published[-1].path.iterdir()) if path.stat().st_size]
        with contextlib.suppress(FileNotFoundError), self.chance.choice(files).open("r+b") as file:
            place = self.chance.randrange(os.fstat(file.fileno()).st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << self.chance.randrange(8))]))
        return self._signal_rank(signal.SIGKILL)

    # -- what it knows ---------------------------------------------------------------------------------------

    def _nodes(self) -> list[int]:
        job = self.user.cluster.job(self.job)
        return self.user.cluster.names(self.job) if job["JobState"] == "RUNNING" else []

    def _ranks(self) -> list[int]:
        alive = [node for node in self._nodes() if f"node{node}" in self.user.cluster.daemons]
        return [pid for node in alive for pid in self.user.cluster.tasks(node)]

    def _watch(self, now: float) -> None:
        rows = last_rows(self.user.run / "metrics.jsonl", 1 << 12)
        if rows and (not self.seen or rows[-1]["step"] != self.seen[-1][1]):
            self.seen.append((now - self.began, rows[-1]["step"]))

    def _later(self) -> float:
        return time.monotonic() + self.chance.uniform(*self.apart)

    def _in(self, seconds: float, mend: Callable[[], None]) -> None:
        self.mends.append((time.monotonic() + seconds, mend))

    def _mend(self, now: float) -> None:
        for due in [entry for entry in self.mends if entry[0] <= now]:
            self.mends.remove(due)
            due[1]()

    def _note(self, **row: Any) -> None:
        at = round(time.monotonic() - self.began, 1)
        step = self.seen[-1][1] if self.seen else 0
        with self.journal.open("a") as file:
            file.write(json.dumps({"at": at, "step": step, "hurt": sorted(self.hurt), **row}) + "\n")
