"""Is a value out of line with those before it? The statistics of train/guard.py; no torch, no state but a window.

Losses and gradient norms are positive and vary by factors, so both are judged by their logarithms: a value is a
spike when it lies more than `sigmas` standard deviations above the median of the window. The standard deviation is
1.4826 x the median absolute deviation, which a few earlier spikes do not move (a mean and its deviation they would),
so every value of a step whose numbers are finite enters, spikes included: a level that stays high stops being one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

# Standard deviation over median absolute deviation, of a normal distribution.
MAD_TO_SIGMA = 1.4826
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Usual:
    """What a window says is usual: its median, and the largest value that is no spike."""

    median: float
    limit: float


class Window:
    """The last `size` values. floor: the least standard deviation of the logarithm that is believed."""

    def __init__(self, size: int, sigmas: float, floor: float) -> None:
        self._logs: deque[float] = deque(maxlen=size)
        self._sigmas, self._floor, self._enough = sigmas, floor, max(size // 4, 4)

    def usual(self) -> Usual | None:
        """None until a quarter of the window is filled."""
        if len(self._logs) < self._enough:
            return None
        middle = median(self._logs)
        sigma = MAD_TO_SIGMA * median(abs(value - middle) for value in self._logs)
        return Usual(math.exp(middle), math.exp(middle + self._sigmas * max(sigma, self._floor)))

    def add(self, value: float) -> None:
        """Remember a finite value."""
        self._logs.append(math.log(max(value, _SMALLEST)))

    def clear(self) -> None:
        self._logs.clear()

    def state(self) -> list[float]:
        return list(self._logs)

    def load(self, logs: Iterable[float]) -> None:
        self._logs.clear()
        self._logs.extend(logs)
