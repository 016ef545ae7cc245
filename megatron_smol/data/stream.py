"""The rows of one stage: sample number -> (source, epoch, window), for the loader, the ledger and `smol
inspect`.

Joins the turn order of the mixture (blend.py) with the order inside each source (order.py). It depends on
the data section of the recipe, its seed and the sample number only: not on ranks, micro-batches, workers or
restarts. Nothing is read from disk and no index is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_smol import _csrc
from megatron_smol.data.blend import Blend
from megatron_smol.data.order import Cursor, SourceOrder


class StageLike(Protocol):
    """What this file needs of a recipe.plan.StagePlan."""

    @property
    def name(self) -> str: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def weights(self) -> Mapping[str, Fraction]: ...
    @property
    def cursors(self) -> Mapping[str, Cursor]: ...


@dataclass(frozen=True)
class Rows:
    """Consecutive samples of a stage. Row i is window `window[i]` of the `epoch[i]`-th pass over
    `names[source[i]]`.
    """

    source: NDArray[np.uint16]  # [n]
    epoch: NDArray[np.int64]  # [n]
    window: NDArray[np.int64]  # [n]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def counts(self) -> dict[str, int]:
        """Rows of each source that gives any."""
        drawn = np.bincount(self.source, minlength=len(self.names))
        return {name: int(count) for name, count in zip(self.names, drawn, strict=True) if count}


class StageStream:
    """Random access to the samples of a stage; sample 0 is the first of the stage."""

    def __init__(self, stage: StageLike, orders: Mapping[str, SourceOrder]) -> None:
        self._blend = Blend({name: weight for name, weight in stage.weights.items() if weight > 0})
        self.names = self._blend.names
        for name in self.names:
            if stage.cursors[name].seq_length != stage.seq_length:
                raise ValueError(
                    f"stage '{stage.name}' reads windows of {stage.seq_length}, but its cursor of '{name}' "
                    f"counts windows of {stage.cursors[name].seq_length}: SourceOrder.enter was not called"
                )
        self._layouts = [orders[name].layout(stage.seq_length) for name in self.names]
        self._start = np.array([stage.cursors[name].position for name in self.names], dtype=np.int64)

    def rows(self, start: int, stop: int) -> Rows:
        """The samples [start, stop) of the stage, in O(stop - start)."""
        source, ordinal = self._blend.lookup(start, stop)
        epoch, window = _csrc.lookup_windows(self._layouts, source, self._start[source] + ordinal)
        return Rows(source, epoch, window, self.names)
