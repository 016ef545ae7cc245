"""Whether two arms differ by more than their seeds do.

Every seed is one block: it gives all arms the same order of data. What arm and seed together do not explain is noise, and
all arms of one budget estimate it together (a randomised block design), so that two seeds are enough for a test: with a
arms and n seeds it has (a - 1)(n - 1) degrees of freedom, where a paired t test of two arms has n - 1. It takes the noise to
be alike in all arms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

# Below it a difference is called clear.
CLEAR_P = 0.05

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Contrast:
    """A difference of two means over the same seeds. error and p are None where the seeds cannot tell."""

    difference: float
    error: float | None
    p: float | None


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one run that arm and seed do not explain, and its degrees of freedom."""

    deviation: float
    freedom: int


def noise_of(arms: Mapping[str, BySeed]) -> Noise | None:
    """From all arms that have every seed; None with fewer than two arms or two seeds."""
    seeds = sorted({seed for own in arms.values() for seed in own})
    complete = [own for own in arms.values() if len(own) == len(seeds)]
    freedom = (len(complete) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return None
    of_seed = {seed: statistics.fmean(own[seed] for own in complete) for seed in seeds}
    overall = statistics.fmean(of_seed.values())
    squares = 0.0
    for own in complete:
        mean = statistics.fmean(own.values())
        squares += sum((own[seed] - mean - of_seed[seed] + overall) ** 2 for seed in seeds)
    return Noise(math.sqrt(squares / freedom), freedom)


def contrast(own: BySeed, other: BySeed, noise: Noise | None) -> Contrast | None:
    """`own` minus `other`; None when they share no seed."""
    shared = sorted(own.keys() & other.keys())
    if not shared:
        return None
    difference = statistics.fmean(own[seed] - other[seed] for seed in shared)
    if noise is None:
        return Contrast(difference, None, None)
    error = noise.deviation * math.sqrt(2 / len(shared))
    return Contrast(difference, error, _two_sided(difference, error, noise.freedom))


def _two_sided(difference: float, error: float, freedom: int) -> float | None:
    if error == 0:
        return None
    from scipy.stats import t

    return float(2 * t.sf(abs(difference / error), freedom))


def holm(found: Mapping[str, float]) -> dict[str, float]:
    """p values for so many comparisons at once (Holm 1979): the chance of even one false claim stays at p."""
    corrected: dict[str, float] = {}
    least = 0.0
    for position, (name, p) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, p * (len(found) - position)))
        corrected[name] = least
    return corrected
