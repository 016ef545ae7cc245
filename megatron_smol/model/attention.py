"""Core attention for megatron-core's local layers (no Transformer Engine).

megatron-core's own local attention builds the [b, heads, s, s] scores (24 layers x 32 heads x 8192^2 x 2 bytes = 103 GB
for the 1.7B at length 8192). This module has the same constructor and shapes, and is used on CPU and on GPUs without
Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_smol.model.context_parallel import RingAttention, attend_all_gather


class SdpaCoreAttention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`: memory linear in the sequence length.

    Grouped queries are handled inside the kernel. An attention mask, when given, says where document
    boundaries are (see `documents_mask`); without one, attention is causal over the whole window, as
    SmolLM2 was trained.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert not config.attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,  # [s, b, heads, d]
        key: Tensor,  # [s, b, kv_heads, d]
        value: Tensor,  # [s, b, kv_heads, d]
        attention_mask: Tensor | None,  # [b, 1, s, s of the whole window], True where a query may look
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:  # [s, b, heads * d]
        assert attention_bias is None
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        if self.config.context_parallel_size > 1:
            return self._shared(q, k, v, attention_mask).permute(2, 0, 1, 3).flatten(2)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What Transformer Engine computes from `cu_seqlens` alone, by a mask. [t, heads, d] -> [t, 1, heads * d]."""
        assert self.config.context_parallel_size == 1
        lengths = cu_seqlens.diff()
        documents = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        rows = (x.flatten(0, -3).unsqueeze(1) for x in (query, key, value))  # [t, 1, heads, d]
        return self(*rows, documents_mask(documents[None]))

    def _shared(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over a window whose tokens the context-parallel ranks share; s is this rank's part."""
        group = get_context_parallel_group()
        if mask is not None or self.config.cp_comm_type == "all_gather":
            return attend_all_gather(q, k, v, mask, self.softmax_scale, group)
        repeats = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        return RingAttention.apply(q, k, v, self.softmax_scale, group)


def documents_mask(documents: Tensor) -> Tensor:
    """Causal mask that also stops at document boundaries, from the number of each token's document, [b, s].

    Returns [b, 1, s, s], True where query position i (row) may look at key position j (column). Rotary positions are
    relative, so inside a document nothing else needs resetting.
    """
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)
