"""From the order of a stage to the tensors of this rank: the last step of the data's way to the model.

The rows of a global batch are the same whatever the layout; a rank only picks its share of them. So a run
can go on with more or fewer data-parallel ranks and still read the same documents in the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_smol.data.order import SourceOrder
from megatron_smol.data.source import TokenSource
from megatron_smol.data.stream import Rows, StageStream
from megatron_smol.errors import UserError
from megatron_smol.recipe.plan import StagePlan


@dataclass(frozen=True)
class Share:
    """Which rank of how many data-parallel ones this is."""

    rank: int
    size: int


@dataclass
class MicroBatch:
    """tokens, labels: [b, s] int64; mask: [b, 1, s, s] bool, True where attention may look, or None: causal."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, windows: np.ndarray, device: torch.device, mask_eod: int | None = None) -> MicroBatch:
        """windows: [b, s + 1] ids. With `mask_eod`, attention stops at documents, which end with that id."""
        ids = torch.from_numpy(windows.astype(np.int64)).to(device, non_blocking=True)
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if mask_eod is None:
            return cls(tokens, labels)
        from megatron_smol.model.attention import document_mask

        return cls(tokens, labels, document_mask(tokens, mask_eod))


@dataclass
class GlobalBatch:
    """This rank's micro-batches of a step, and the rows of the whole global batch for the ledger."""

    micro_batches: list[MicroBatch]
    rows: Rows


class StageLoader:
    """Batches of one stage, read ahead by one in a background thread."""

    def __init__(
        self,
        stage: StagePlan,
        orders: Mapping[str, SourceOrder],
        sources: Mapping[str, TokenSource],
        share: Share,
        device: torch.device,
    ) -> None:
        check_divisible(stage, share.size)
        self.stage, self.share, self.device = stage, share, device
        self._stream = StageStream(stage, orders)
        self._sources = [sources[name] for name in self._stream.names]
        self._mask_eod = _eod(sources, self._stream.names, stage) if stage.document_mask else None

    def batches(self, first_step: int) -> Iterator[GlobalBatch]:
        """The batches of lineage steps first_step, first_step + 1, ... to the end of the stage."""
        with ThreadPoolExecutor(1, "read-ahead") as reader:
            pending = reader.submit(self.batch, first_step)
            for following in range(first_step + 1, self.stage.end_step + 1):
                batch = pending.result()
                if following < self.stage.end_step:
                    pending = reader.submit(self.batch, following)
                yield batch

    def batch(self, step: int) -> GlobalBatch:
        """The batch that is read when `step` lineage steps are complete."""
        first = (step - self.stage.start_step) * self.stage.global_batch
        rows = self._stream.rows(first, first + self.stage.global_batch)
        return GlobalBatch([self._micro_batch(rows, mine) for mine in self._my_rows()], rows)

    def _my_rows(self) -> Iterator[range]:
        """Row numbers of each of this rank's micro-batches: ranks take turns of micro_batch rows."""
        size, turn = self.stage.micro_batch, self.stage.micro_batch * self.share.size
        for start in range(self.share.rank * size, self.stage.global_batch, turn):
            yield range(start, start + size)

    def _micro_batch(self, rows: Rows, mine: range) -> MicroBatch:
        length = self.stage.seq_length
        windows = [self._sources[rows.source[i]].read(int(rows.window[i]) * length, length + 1) for i in mine]
        return MicroBatch.of(np.stack(windows), self.device, self._mask_eod)


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
    start = source.tokens - holdout_tokens
    count = min(windows, (holdout_tokens - 1) // seq_length)
    return [
        MicroBatch.of(source.read(start + i * seq_length, seq_length + 1)[None], device, mask_eod)
        for i in range(share.rank, count, share.size)
    ]


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
