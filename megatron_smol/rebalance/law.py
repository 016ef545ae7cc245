"""Loss as a function of the mixture, fitted to the arms of an ablation: L = c + k exp(t . w) (Ye et al. 2024, "Data Mixing
Laws", arXiv 2403.16952), or a plain linear one where it predicts better or the arms are too few for more.

Arms vary in few directions (a candidate against the running mixture is one), so the law is fitted in those. Its error is
that on arms left out one at a time; the same error of a law that knows nothing, the mean, is beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Point = tuple[dict[str, float], float]  # weights, loss
Kind = Literal["exponential", "linear"]
_SAME = 1e-9  # singular values below are rounding


@dataclass(frozen=True)
class Law:
    """A fit to `arms` mixtures in `directions` directions. left_out_error, mean_error: root mean square, in the loss's unit."""

    kind: Kind
    arms: int
    directions: int
    left_out_error: float
    mean_error: float
    lowest: dict[str, float] = field(repr=False)  # weights seen, by source
    highest: dict[str, float] = field(repr=False)
    _predict: Callable[[Array], float] = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether it knows clearly more than the mean of the arms."""
        return self.left_out_error < self.mean_error / 2

    def predict(self, weights: dict[str, float]) -> float:
        return self._predict(np.array([weights.get(name, 0.0) for name in self.lowest]))

    def has_seen(self, weights: dict[str, float]) -> bool:
        """Whether every weight lies between the lowest and the highest of the arms."""
        names = self.lowest.keys() | weights.keys()
        seen = ((self.lowest.get(n, 0.0), weights.get(n, 0.0), self.highest.get(n, 0.0)) for n in names)
        return all(low - _SAME <= weight <= high + _SAME for low, weight, high in seen)


def fit(points: Sequence[Point]) -> Law | None:
    """The better of the two laws; None when the arms are too few to leave one out (fewer than directions + 3)."""
    names = sorted({name for weights, _ in points for name in weights})
    mixtures = np.array([[weights.get(name, 0.0) for name in names] for weights, _ in points])
    losses = np.array([loss for _, loss in points])
    directions = 0 if len(points) < 2 else int(np.linalg.matrix_rank(mixtures - mixtures[0], tol=_SAME))
    if directions == 0 or len(points) < directions + 3:
        return None
    kinds: list[Kind] = ["linear"] if len(points) < directions + 4 else ["linear", "exponential"]
    errors = {kind: _left_out(mixtures, losses, kind) for kind in kinds}
    kind = min(kinds, key=lambda kind: errors[kind])
    others = (losses.sum() - losses) / (len(losses) - 1)
    return Law(
        kind,
        len(points),
        directions,
        errors[kind],
        float(np.sqrt(np.mean((losses - others) ** 2))),
        dict(zip(names, mixtures.min(axis=0).tolist(), strict=True)),
        dict(zip(names, mixtures.max(axis=0).tolist(), strict=True)),
        _FITS[kind](mixtures, losses),
    )


def _left_out(mixtures: Array, losses: Array, kind: Kind) -> float:
    misses = []
    for arm in range(len(losses)):
        rest = np.arange(len(losses)) != arm
        misses.append(_FITS[kind](mixtures[rest], losses[rest])(mixtures[arm]) - losses[arm])
    return math.sqrt(float(np.mean(np.square(misses))))


def _directions(mixtures: Array) -> tuple[Array, Array]:
    """(centre, basis [directions, sources]) of what the arms vary in."""
    centre = mixtures.mean(axis=0)
    _, sizes, basis = np.linalg.svd(mixtures - centre, full_matrices=False)
    return centre, basis[sizes > _SAME]


def _linear(mixtures: Array, losses: Array) -> Callable[[Array], float]:
    centre, basis = _directions(mixtures)
    inputs = np.column_stack([np.ones(len(losses)), (mixtures - centre) @ basis.T])
    solution = np.linalg.lstsq(inputs, losses, rcond=None)[0]
    return lambda weights: float(solution[0] + (weights - centre) @ basis.T @ solution[1:])


def _exponential(mixtures: Array, losses: Array) -> Callable[[Array], float]:
    """k is positive, as in the paper. Under a floor c the logarithm of L - c is linear in the mixture; c is the one that
    leaves least, from a thousandth of the arms' spread below the lowest of them to a hundred spreads."""
    from scipy.optimize import minimize_scalar

    centre, basis = _directions(mixtures)
    inputs = np.column_stack([np.ones(len(losses)), (mixtures - centre) @ basis.T])
    lowest, spread = float(losses.min()), float(np.ptp(losses)) or 1.0

    def under(exponent: float) -> tuple[float, Array, float]:
        """(floor, coefficients, squared misses); heights as weights make the errors those of the loss itself."""
        floor = lowest - spread * 10**exponent
        heights = losses - floor
        solved = np.linalg.lstsq(inputs * heights[:, None], np.log(heights) * heights, rcond=None)
        found = solved[0].astype(np.float64)
        return floor, found, float(np.sum((floor + np.exp(inputs @ found) - losses) ** 2))

    near = min(np.linspace(-3, 2, 26), key=lambda exponent: under(exponent)[2])
    best = minimize_scalar(
        lambda exponent: under(exponent)[2],
        bounds=(near - 0.2, near + 0.2),
        method="bounded",
        options={"xatol": 1e-6},
    )
    floor, found, _ = under(best.x)
    return lambda weights: float(
        floor + np.exp(min(50.0, found[0] + (weights - centre) @ basis.T @ found[1:]))
    )


_FITS: dict[Kind, Callable[[Array, Array], Callable[[Array], float]]] = {
    "linear": _linear,
    "exponential": _exponential,
}
