"""Core attention and RMSNorm for megatron-core's local layers (no Transformer Engine).

megatron-core's own local attention builds the [b, heads, s, s] scores (24 layers x 32 heads x 8192^2 x 2 bytes = 103 GB
for the 1.7B at length 8192) and its RMSNorm refuses sequence parallelism. These two modules
have the same constructors and shapes, and are used on CPU and on GPUs without Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor


class SdpaCoreAttention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`: memory linear in the sequence length.

    Grouped queries are handled inside the kernel. An attention mask, when given, says where document
    boundaries are (see `document_mask`); without one, attention is causal over the whole window, as
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
        assert config.context_parallel_size == 1 and not config.attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,  # [s, b, heads, d]
        key: Tensor,  # [s, b, kv_heads, d]
        value: Tensor,  # [s, b, kv_heads, d]
        attention_mask: Tensor | None,  # [b, 1, s, s], True where a query may look
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:  # [s, b, heads * d]
        assert attention_bias is None and packed_seq_params is None
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
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


def document_mask(tokens: Tensor, eod_id: int) -> Tensor:
    """Causal mask that also stops at document boundaries.

    tokens: [b, s] ids; a document ends with `eod_id`, which belongs to the document it ends.
    Returns [b, 1, s, s], True where query position i (row) may look at key position j (column).
    Rotary positions are relative, so inside a document nothing else needs resetting.
    """
    ends = tokens.eq(eod_id).int()
    document = ends.cumsum(1) - ends  # [b, s]: number of documents that ended before this token
    same = document.unsqueeze(2) == document.unsqueeze(1)
    return same.tril().unsqueeze(1)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` that tells megatron-core when its gradient must be summed over tensor ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
