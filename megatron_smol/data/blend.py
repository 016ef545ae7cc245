"""The mixture of one stage: which source gives the next sample. Weights come from the recipe; stream.py
reads the result.

Weights are exact fractions over a common denominator D of at most 2^16, so the order repeats every D
samples and one period, built once in C++ (csrc/blend.cpp), answers for any position of a run of any length.
Every prefix of n samples holds floor or ceil of weight x n samples of each source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_smol import _csrc
from megatron_smol.errors import UserError

MAX_PERIOD = 2**16
# Weights typed by people may miss 1 by rounding (0.333333 three times); more than this is a mistake.
SUM_TOLERANCE = Fraction(1, 10**6)


def exact_weights(weights: Mapping[str, str | float | Fraction]) -> dict[str, Fraction]:
    """The weights as fractions that sum to exactly 1 and share a denominator of at most MAX_PERIOD.

    A decimal is taken as written (0.1 is 1/10). Weights that need a larger denominator are rounded to
    multiples of 1/MAX_PERIOD by largest remainder, and no positive weight falls below 1/MAX_PERIOD. Keeps
    the order of the names.
    """
    exact = {name: _as_fraction(name, weight) for name, weight in weights.items()}
    total = sum(exact.values(), Fraction(0))
    if abs(total - 1) > SUM_TOLERANCE:
        listed = ", ".join(f"{name} {float(weight):g}" for name, weight in exact.items())
        raise UserError(
            f"mixture weights must sum to 1, but sum to {float(total):.7g} ({listed or 'no source'})"
        )
    exact = {name: weight / total for name, weight in exact.items()}
    if math.lcm(*(weight.denominator for weight in exact.values())) <= MAX_PERIOD:
        return exact
    return _rounded(exact)


def _as_fraction(name: str, weight: str | float | Fraction) -> Fraction:
    try:
        exact = weight if isinstance(weight, Fraction) else Fraction(str(weight))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"weight of source '{name}' must be a number such as 0.25, got {weight!r}") from None
    if not 0 <= exact <= 1 + SUM_TOLERANCE:
        raise UserError(f"weight of source '{name}' must lie between 0 and 1, got {weight}")
    return exact


def _rounded(exact: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """Multiples of 1/MAX_PERIOD by largest remainder; a weight that would round to nothing keeps one slot."""
    quota = {name: weight * MAX_PERIOD for name, weight in exact.items()}
    if sum(share > 0 for share in quota.values()) > MAX_PERIOD:
        raise UserError(f"a mixture can hold at most {MAX_PERIOD} sources")
    slots = {name: max(math.floor(share), int(share > 0)) for name, share in quota.items()}
    missing = MAX_PERIOD - sum(slots.values())
    # Most under-served first when slots are left over; most over-served first when tiny weights took too
    # many.
    by_need = sorted(quota, key=lambda name: slots[name] - quota[name], reverse=missing < 0)
    while missing:
        step = 1 if missing > 0 else -1
        for name in by_need:
            if missing and quota[name] > 0 and slots[name] + step >= 1:
                slots[name] += step
                missing -= step
    return {name: Fraction(count, MAX_PERIOD) for name, count in slots.items()}


class Blend:
    """The turn order of a mixture. It depends on the names and weights only, not on the order they are
    written in.
    """

    def __init__(self, weights: Mapping[str, Fraction]) -> None:
        if sum(weights.values(), Fraction(0)) != 1:
            raise UserError("blend weights must sum to exactly 1: pass them through exact_weights first")
        self.names: tuple[str, ...] = tuple(sorted(weights))
        self.period: int = math.lcm(*(weight.denominator for weight in weights.values()))
        if self.period > MAX_PERIOD:
            raise UserError(
                f"blend weights need a period of {self.period}, more than {MAX_PERIOD}: use exact_weights"
            )
        self.numerators: list[int] = [int(weights[name] * self.period) for name in self.names]
        self._source, self._ordinal = _csrc.blend_period(self.numerators)

    def lookup(self, start: int, stop: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """For the samples [start, stop) of the stage: index into `names`, and which sample of that source
        it is.
        """
        return _csrc.blend_lookup(self._source, self._ordinal, self.numerators, start, stop)

    def samples_of(self, name: str, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples that are the ordinals[i]-th of a source: the inverse of `lookup`."""
        index = self.names.index(name)
        turn, ordinal = np.divmod(ordinals, self.numerators[index])
        return turn * self.period + np.flatnonzero(self._source == index)[ordinal]

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the stage's first `samples` samples each source gives."""
        if samples < 0:
            raise ValueError(f"samples must not be negative, got {samples}")
        turns, rest = divmod(samples, self.period)
        in_rest = np.bincount(self._source[:rest], minlength=len(self.names))
        return {
            name: turns * numerator + int(extra)
            for name, numerator, extra in zip(self.names, self.numerators, in_rest, strict=True)
        }


def build_blending_indices(
    weights: Sequence[float], size: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Megatron's own blend, bit-equal to megatron-core 0.16.1's, for those who must continue an old run."""
    return _csrc.build_blending_indices(weights, size)
