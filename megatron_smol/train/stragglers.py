"""Which rank is slower than the others: a hook that compares what each needs for its own work.

Own work is waiting for data, forward and backward, up to where the step waits for data-parallel ranks. Each rank's
lower quartile over a few steps (what disturbs single steps is not its fault) is compared with the median rank's; a
rank that is slower by the recipe's factor IN_A_ROW times is named, once, until it is as long not slow. Ranks that share
a model (tensor, pipeline, context parallel) wait for each other inside the step, so they appear slow together.
"""

from __future__ import annotations

import socket
import statistics
from typing import TYPE_CHECKING

import torch

from megatron_smol.model.backend import backend
from megatron_smol.recipe.schema import Guard
from megatron_smol.train.hooks import Hook, StepDone
from megatron_smol.train.incidents import write_incident

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer

# A difference that is smaller is the operating system's.
LEAST_SECONDS = 0.01
IN_A_ROW = 4


class Streaks:
    """Who is slow for how long: every rank's seconds go in, the ranks to be named come out."""

    def __init__(self, ranks: int, factor: float) -> None:
        self._factor = factor
        # By rank: comparisons in a row in which it was slow, or (negative) was not.
        self._streaks = [0] * ranks
        self._named: set[int] = set()

    def newly_slow(self, seconds: list[float]) -> list[int]:
        usual = statistics.median_low(seconds)  # of two ranks, the faster
        limit = max(self._factor * usual, usual + LEAST_SECONDS)
        self._streaks = [
            max(streak, 0) + 1 if own > limit else min(streak, 0) - 1
            for streak, own in zip(self._streaks, seconds, strict=True)
        ]
        self._named -= {rank for rank, streak in enumerate(self._streaks) if streak <= -IN_A_ROW}
        new = [rank for rank, streak in enumerate(self._streaks) if streak >= IN_A_ROW]
        new = [rank for rank in new if rank not in self._named]
        self._named.update(new)
        return new


class Stragglers(Hook):
    """Names slow ranks in the log and in incidents.jsonl; TensorBoard shows the slowest rank's factor."""

    def __init__(self, settings: Guard) -> None:
        self._settings = settings
        self._own: list[float] = []
        self._sums: list[float] = []  # by rank, of what was compared
        self._comparisons = 0

    def on_run_start(self, trainer: Trainer) -> None:
        self._hosts: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(self._hosts, socket.gethostname())
        self._streaks = Streaks(len(self._hosts), self._settings.straggler)
        self._own = []

    def on_stage_start(self, trainer: Trainer, stage: object) -> None:
        self._own = []

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        every = self._settings.straggler_every
        if not every or len(self._hosts) == 1 or not done.result.own_seconds:
            return
        self._own.append(done.own_seconds)
        if len(self._own) < every:
            return
        seconds = _of_all_ranks(sorted(self._own)[len(self._own) // 4])
        self._own = []
        self._compare(trainer, done, seconds)

    def _compare(self, trainer: Trainer, done: StepDone, seconds: list[float]) -> None:
        usual = statistics.median_low(seconds)  # of two ranks, the faster
        self._comparisons += 1
        self._sums = [a + b for a, b in zip(self._sums or [0.0] * len(seconds), seconds, strict=True)]
        done.scalars["slowest_rank"] = max(seconds) / usual
        for rank in self._streaks.newly_slow(seconds):
            self._name(trainer, done, rank, seconds[rank], usual)

    def _name(self, trainer: Trainer, done: StepDone, rank: int, seconds: float, usual: float) -> None:
        host = self._hosts[rank]
        reason = (
            f"rank {rank} on {host} is slow: {seconds:.3f} s for its own part of a step, {seconds / usual:.2f} times the "
            f"median rank's, over {IN_A_ROW * self._settings.straggler_every} steps"
        )
        trainer.say(f"!! {reason}")
        if torch.distributed.get_rank() == 0:
            place = {"stage": done.stage.name, "stage_index": done.stage.index, "step": done.step}
            who = {"rank": rank, "host": host, "seconds": seconds, "median": usual}
            told = {"what": "straggler", "decision": "note", "lasting": True, "reason": reason}
            write_incident(trainer.plan.recipe.run_path, place | told | who)

    def on_run_end(self, trainer: Trainer, finished: bool) -> None:
        if not self._comparisons:
            return
        means = [total / self._comparisons for total in self._sums]
        slowest = max(range(len(means)), key=means.__getitem__)
        usual = statistics.median_low(means)
        trainer.say(
            f"own part of a step: median rank {usual:.3f} s, slowest {means[slowest]:.3f} s "
            f"({means[slowest] / usual:.2f} times: rank {slowest} on {self._hosts[slowest]})"
        )


def _of_all_ranks(seconds: float) -> list[float]:
    mine = torch.tensor([seconds], dtype=torch.float64, device=backend().device)
    found = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, mine)
    return [float(value) for value in found]
