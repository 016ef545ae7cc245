"""From the order of a stage to the tensors of this rank: the last step of the data's way to the model.

The rows of a global batch are the same whatever the layout; a rank only picks its share of them. So a run
can go on with more or fewer data-parallel ranks and still read the same documents in the same steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megatron_smol.data.batch import MicroBatch
from megatron_smol.data.indexed import TokenArray
from megatron_smol.data.order import SourceOrder
from megatron_smol.data.packing import check_packed, ignored_labels
from megatron_smol.data.source import TokenSource
from megatron_smol.data.stream import Rows, open_stream
from megatron_smol.errors import UserError
from megatron_smol.recipe.plan import StagePlan

# Batches that lie ready. One hides the time of reading; a second one evens out a slow disk or network.
READ_AHEAD = 2


@dataclass(frozen=True)
class Share:
    """Which rank of how many data-parallel ones this is."""

    rank: int
    size: int


@dataclass
class GlobalBatch:
    """This rank's micro-batches of a step, and the rows of the whole global batch for the ledger."""

    micro_batches: list[MicroBatch]
    rows: Rows


class StageLoader:
    """Batches of one stage, read ahead in a background thread."""

    def __init__(
        self,
        stage: StagePlan,
        orders: Mapping[str, SourceOrder],
        sources: Mapping[str, TokenSource],
        share: Share,
        device: torch.device,
        read_ahead: int = READ_AHEAD,
    ) -> None:
        check_divisible(stage, share.size)
        check_packed(stage, sources)
        self.stage, self.share, self.device, self.read_ahead = stage, share, device, read_ahead
        self._stream = open_stream(stage, orders)
        self._sources = self._stream.readers(sources)
        self._dtype = np.result_type(*(source.dtype for source in self._sources))
        self._mask_eod = _eod(sources, self._stream.names, stage) if stage.document_mask else None

    def batches(self, first_step: int) -> Iterator[GlobalBatch]:
        """The batches of lineage steps first_step, first_step + 1, ... to the end of the stage."""
        reader = ThreadPoolExecutor(1, "read-ahead")
        pending: deque[Future[GlobalBatch]] = deque()
        try:
            for step in range(first_step, self.stage.end_step):
                pending.append(reader.submit(self.batch, step))
                if len(pending) > self.read_ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)

    def batch(self, step: int) -> GlobalBatch:
        """The batch that is read when `step` lineage steps are complete."""
        first = (step - self.stage.start_step) * self.stage.global_batch
        rows = self._stream.rows(first, first + self.stage.global_batch)
        mine = self._my_rows()
        windows, ignored = self._read(rows, mine)
        micro_batches = [
            MicroBatch.of(
                windows[i : i + self.stage.micro_batch],
                self.device,
                self._mask_eod,
                None if ignored is None else ignored[i : i + self.stage.micro_batch],
            )
            for i in range(0, len(mine), self.stage.micro_batch)
        ]
        return GlobalBatch(micro_batches, rows)

    def _my_rows(self) -> list[int]:
        """Row numbers of this rank's micro-batches, one after another: ranks take turns of micro_batch rows."""
        size, turn = self.stage.micro_batch, self.stage.micro_batch * self.share.size
        starts = range(self.share.rank * size, self.stage.global_batch, turn)
        return [row for start in starts for row in range(start, start + size)]

    def _read(self, rows: Rows, mine: list[int]) -> tuple[TokenArray, np.ndarray | None]:
        """Windows [rows, s + 1] and which labels [rows, s] carry no loss (None: no source here has any)."""
        length = self.stage.seq_length
        windows = np.empty((len(mine), length + 1), self._dtype)
        ignored = None
        if any(source.packed_length for source in self._sources):
            ignored = np.zeros((len(mine), length), bool)
        chosen, starts = rows.source[mine], rows.window[mine] * length
        for index, source in enumerate(self._sources):
            places = np.flatnonzero(chosen == index)
            if not places.size:
                continue
            into = windows if source.dtype == self._dtype else windows.astype(source.dtype)
            source.read_windows(starts[places].tolist(), [into[place] for place in places])
            if into is not windows:
                windows[places] = into[places]
            if source.packed_length and ignored is not None:
                assert source.eod_id is not None
                ignored[places] = ignored_labels(windows[places], source.eod_id)
        return windows, ignored


def held_out(
    source: TokenSource,
    holdout_tokens: int,
    seq_length: int,
    windows: int,
    share: Share,
    device: torch.device,
    mask_eod: int | None = None,
) -> list[MicroBatch]:
    """This rank's share of the first `windows` windows in the held-out end of a source, one window a batch."""
    start, packed = source.tokens - holdout_tokens, source.packed_length
    if packed:
        start += -start % packed  # where documents are whole
    count = min(windows, (source.tokens - start - 1) // seq_length)
    batches = []
    for i in range(share.rank, count, share.size):
        window = source.read(start + i * seq_length, seq_length + 1)[None]
        assert not packed or source.eod_id is not None
        ignored = ignored_labels(window, source.eod_id) if packed and source.eod_id is not None else None
        batches.append(MicroBatch.of(window, device, mask_eod, ignored))
    return batches


def check_divisible(stage: StagePlan, data_parallel: int) -> None:
    """Refuse a number of data-parallel ranks that cannot share the stage's global batch evenly."""
    if stage.global_batch % (stage.micro_batch * data_parallel):
        per_micro = stage.global_batch // stage.micro_batch
        allowed = [n for n in range(1, per_micro + 1) if per_micro % n == 0]
        raise UserError(
            f"stage '{stage.name}' has a global batch of {stage.global_batch} windows in micro-batches of "
            f"{stage.micro_batch}, which {data_parallel} data-parallel ranks cannot share evenly; allowed: "
            f"{', '.join(map(str, allowed))} (or change micro_batch)"
        )


def _eod(sources: Mapping[str, TokenSource], names: tuple[str, ...], stage: StagePlan) -> int:
    """The end-of-document id that a document mask needs; every source of the stage must say it, and agree."""
    ids = {name: sources[name].eod_id for name in names}
    if None in ids.values() or len(set(ids.values())) > 1:
        raise UserError(
            f"stage '{stage.name}' sets document_mask, which needs one end-of-document id in all its sources, "
            f"but they say {ids}; preprocess them with --append-eod, or set document_mask: false"
        )
    return next(iter(ids.values()))  # type: ignore[return-value]
