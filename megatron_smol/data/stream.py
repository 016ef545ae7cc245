"""The rows of one stage: sample number -> (source, epoch, window), for the loader, the ledger and `smol
inspect`.

Joins the turn order of the mixture (blend.py) with the order inside each source (order.py). It depends on
the data section of the recipe, its seed and the sample number only: not on ranks, micro-batches, workers or
restarts. Nothing is read from disk and no index is built. A stage that continues a run of Megatron-LM takes
that run's order instead (megatron_order.py); `open_stream` chooses, and both answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_smol import _csrc
from megatron_smol.data.blend import Blend
from megatron_smol.data.order import Cursor, SourceOrder

if TYPE_CHECKING:  # the order itself opens no file
    from megatron_smol.data.indexed import TokenArray
    from megatron_smol.data.source import TokenSource

# Rows that a stage takes from each source, by the epoch of the source they belong to.
Use = dict[str, dict[int, int]]


@dataclass(frozen=True)
class Rows:
    """Consecutive samples of a stage. Row i is window `window[i]` of the `epoch[i]`-th pass over
    `names[source[i]]`. A source may have several places in `names`.
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
        found: dict[str, int] = {}
        for name, count in zip(self.names, drawn.tolist(), strict=True):
            if count:
                found[name] = found.get(name, 0) + count
        return found


@dataclass(frozen=True)
class Reads:
    """When a stretch of tokens is read: sample `sample[i]` of a stage is a window that holds some of it."""

    sample: NDArray[np.int64]  # [n], ascending
    epoch: NDArray[np.int64]  # [n]
    window: NDArray[np.int64]  # [n]


class WindowReader(Protocol):
    """Where the tokens of a row are: row i of a stage is `readers[source[i]].read(window[i] * seq_length,
    seq_length + 1)`. A TokenSource is one."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def eod_id(self) -> int | None: ...
    @property
    def packed_length(self) -> int | None: ...
    def read(self, start: int, count: int) -> TokenArray: ...
    def read_windows(self, starts: Sequence[int], into: Sequence[TokenArray]) -> None: ...


class Stream(Protocol):
    """Random access to the samples of a stage; sample 0 is the first of the stage."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def rows(self, start: int, stop: int) -> Rows:
        """The samples [start, stop) of the stage, in O(stop - start)."""

    def readers(self, sources: Mapping[str, TokenSource]) -> Sequence[WindowReader]:
        """What to read the windows from, one for each of `names`."""

    def use(self, samples: int) -> Use:
        """What the first `samples` samples take from each source that gives any, without visiting them."""

    def reads_of(self, source: str, start: int, stop: int, samples: int) -> Reads:
        """Which of the stage's first `samples` samples hold any of the tokens [start, stop) of a source as
        inputs: the inverse of `rows`."""


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
    @property
    def foreign_order(self) -> Stream | None: ...


def open_stream(stage: StageLike, orders: Mapping[str, SourceOrder]) -> Stream:
    """The stage's samples: in the order of an older run where the stage continues one, else in ours."""
    return stage.foreign_order or StageStream(stage, orders)


class StageStream:
    """A stage in our own order."""

    def __init__(self, stage: StageLike, orders: Mapping[str, SourceOrder]) -> None:
        if stage.foreign_order is not None:
            raise ValueError(f"stage '{stage.name}' is read in the order of an older run: call open_stream")
        self._blend = Blend({name: weight for name, weight in stage.weights.items() if weight > 0})
        self._orders, self._seq_length = orders, stage.seq_length
        for name in self.names:
            if stage.cursors[name].seq_length != stage.seq_length:
                raise ValueError(
                    f"stage '{stage.name}' reads windows of {stage.seq_length}, but its cursor of '{name}' "
                    f"counts windows of {stage.cursors[name].seq_length}: SourceOrder.enter was not called"
                )
        self._layouts = [orders[name].layout(stage.seq_length) for name in self.names]
        self._start = np.array([stage.cursors[name].position for name in self.names], dtype=np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        return self._blend.names

    def rows(self, start: int, stop: int) -> Rows:
        source, ordinal = self._blend.lookup(start, stop)
        epoch, window = _csrc.lookup_windows(self._layouts, source, self._start[source] + ordinal)
        return Rows(source, epoch, window, self.names)

    def readers(self, sources: Mapping[str, TokenSource]) -> Sequence[WindowReader]:
        return [sources[name] for name in self.names]

    def use(self, samples: int) -> Use:
        drawn = self._blend.counts(samples)
        return {
            name: split_by_epoch(
                int(start), drawn[name], self._orders[name].windows_per_epoch(self._seq_length)
            )
            for name, start in zip(self.names, self._start, strict=True)
            if drawn[name]
        }

    def reads_of(self, source: str, start: int, stop: int, samples: int) -> Reads:
        order, drawn = self._orders[source], self._blend.counts(samples).get(source, 0)
        first = int(self._start[self.names.index(source)]) if drawn else 0
        per_epoch = order.windows_per_epoch(self._seq_length)
        windows = np.arange(
            start // self._seq_length, min(-(-stop // self._seq_length), per_epoch), dtype=np.int64
        )
        # Every epoch that the stage touches reads the windows once, inside the stage or outside it.
        epochs = np.arange(first // per_epoch, -(-(first + drawn) // per_epoch), dtype=np.int64)
        epoch, window = (grid.ravel() for grid in np.meshgrid(epochs, windows, indexing="ij"))
        ordinal = order.locate(self._seq_length, epoch, window) - first
        inside = (ordinal >= 0) & (ordinal < drawn)
        if not inside.any():
            return Reads(*(np.empty(0, np.int64) for _ in range(3)))
        sample = self._blend.samples_of(source, ordinal[inside])
        in_turn = np.argsort(sample)
        return Reads(sample[in_turn], epoch[inside][in_turn], window[inside][in_turn])


def split_by_epoch(position: int, rows: int, rows_per_epoch: int) -> dict[int, int]:
    """How many of the rows [position, position + rows) of a source belong to each of its epochs."""
    split, end = {}, position + rows
    while position < end:
        epoch = position // rows_per_epoch
        step = min(end, (epoch + 1) * rows_per_epoch) - position
        split[epoch] = step
        position += step
    return split
