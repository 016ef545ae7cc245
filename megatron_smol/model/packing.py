"""Document masks for attention kernels that take no mask: the windows of a micro-batch as one row of documents.

Transformer Engine's fused attention wants to be told where documents begin (`cu_seqlens`, layout "thd") and starts positions
at 0 in each, which rotary positions do not notice. train/step.py asks `packs`; data/batch.py counted the documents.
"""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_smol.data.batch import Documents, MicroBatch
from megatron_smol.model.backend import backend


def packs(batch: MicroBatch) -> bool:
    """Whether the windows of this micro-batch go through the model as one row."""
    return batch.documents is not None and backend().transformer_engine


def packed(tokens: Tensor, labels: Tensor, documents: Documents) -> tuple[Tensor, Tensor, PackedSeqParams]:
    """[b, s] -> tokens and labels [1, b * s], and where the documents lie in them."""
    bounds: dict[str, Any] = {
        f"{what}_{side}": value
        for side in ("q", "kv")
        for what, value in (("cu_seqlens", documents.cu_seqlens), ("max_seqlen", documents.max_seqlen))
    }
    return tokens.reshape(1, -1), labels.reshape(1, -1), PackedSeqParams(qkv_format="thd", **bounds)
