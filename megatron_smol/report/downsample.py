"""Fewer points for a picture: extremes of each pixel column, means, running means.

Used by `charts`: a run has millions of steps, a screen a thousand columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLUMNS = 1000


def extremes(x: Any, y: Any, low: float, high: float, columns: int = COLUMNS) -> tuple[Floats, Floats]:
    """The lowest and the highest value in each of `columns` equal parts of [low, high], and the first and last of all.

    x [n] ascends; returns [m], m <= 2 * columns + 2, in the order of x. Values that are not finite are left out.
    """
    x_all, y_all = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(y_all)
    if not finite.all():
        x_all, y_all = x_all[finite], y_all[finite]
    if len(x_all) <= 2 * columns:
        return x_all, y_all
    inner = np.linspace(low, high, columns + 1)[1:-1]
    bounds = np.unique(np.concatenate([[0], np.searchsorted(x_all, inner), [len(x_all)]]))
    kept = {0, len(x_all) - 1}
    for start, end in pairwise(bounds.tolist()):
        part = y_all[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    chosen = np.array(sorted(kept))
    return x_all[chosen], y_all[chosen]


def binned(x: Any, y: Any, points: int) -> tuple[Floats, Floats]:
    """Means of at most `points` runs of neighbours, those that are finite."""
    x_all, y_all = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(y_all)
    x_all, y_all = x_all[finite], y_all[finite]
    if len(x_all) <= points:
        return x_all, y_all
    starts = np.linspace(0, len(x_all), points, endpoint=False).astype(int)
    counts = np.diff([*starts, len(x_all)])
    # The last x of a run, not the middle: the curve then ends where the stage ends.
    return x_all[np.append(starts[1:], len(x_all)) - 1], np.add.reduceat(y_all, starts) / counts


def running_mean(values: Any, half: int) -> Floats:
    """Mean of each value with `half` neighbours on both sides, as many as there are near the ends."""
    sums = np.cumsum(np.insert(np.asarray(values, np.float64), 0, 0.0))
    index = np.arange(len(values))
    first, last = np.maximum(0, index - half), np.minimum(len(values), index + half + 1)
    return np.asarray((sums[last] - sums[first]) / (last - first))
