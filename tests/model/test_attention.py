"""The attention core against the definition, and the law `leak`."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_smol.model.attention import SdpaCoreAttention
from tests.helpers import document_mask

S, B, HEADS, KV, D = 24, 2, 4, 2, 8


@pytest.fixture
def attention() -> SdpaCoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * D, num_attention_heads=HEADS, attention_dropout=0.0
    )
    return SdpaCoreAttention(config, 1, None, "self")


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(S, B, heads, D, generator=generator) for heads in (HEADS, KV, KV))


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(HEADS // KV, dim=2) for x in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) / math.sqrt(D)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).reshape(S, B, HEADS * D)


def test_causal(attention: SdpaCoreAttention, qkv: tuple[torch.Tensor, ...]) -> None:
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(*qkv, None), by_definition(*qkv, causal), atol=1e-5, rtol=1e-5)


def test_document_mask_stops_at_the_token_that_ends_a_document() -> None:
    tokens = torch.tensor([[5, 0, 6, 7, 0, 0, 8]])
    allowed = document_mask(tokens, eod_id=0)[0, 0]
    document = [0, 0, 1, 1, 1, 2, 3]
    for i in range(7):
        for j in range(7):
            assert bool(allowed[i, j]) == (j <= i and document[i] == document[j]), (i, j)


def test_leak(attention: SdpaCoreAttention, qkv: tuple[torch.Tensor, ...]) -> None:
    """Changing document A moves nothing in document B, and does without the mask."""
    tokens = torch.ones(B, S, dtype=torch.long)
    tokens[:, 9] = 0
    changed = tuple(torch.cat([torch.randn_like(x[:10]), x[10:]]) for x in qkv)
    mask = document_mask(tokens, eod_id=0)
    masked = [attention(*x, mask)[10:] for x in (qkv, changed)]
    assert torch.equal(*masked)
    assert not torch.allclose(attention(*qkv, None)[10:], attention(*changed, None)[10:])
