"""Attention over a shared sequence equals attention over the whole one, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils

from megatron_smol.model.backend import init_process_group
from megatron_smol.model.context_parallel import RingAttention, attend_all_gather, chunk_order, local_part
from tests.helpers import run_ranks

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 24, 8


def whole_problem(kv_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(BATCH, heads, LENGTH, DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def documents() -> torch.Tensor:
    """[b, 1, s, s]: causal, and cut where documents end, differently in each row of the batch."""
    number = torch.stack([torch.arange(LENGTH) // 7, torch.arange(LENGTH) // 5])
    return (number.unsqueeze(2) == number.unsqueeze(1)).tril().unsqueeze(1)


def expected(kv_heads: int, mask: torch.Tensor | None) -> list[torch.Tensor]:
    q, k, v, grad = whole_problem(kv_heads)
    for x in (q, k, v):
        x.requires_grad_()
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=kv_heads != HEADS
    )
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def shared(kind: str) -> list[Any]:
    """Run by each rank: its part of the output and of the gradients."""
    init_process_group()
    group = dist.group.WORLD
    kv_heads = HEADS if kind == "ring" else KV_HEADS
    q, k, v, grad = (local_part(x, 2, group.size(), group.rank()) for x in whole_problem(kv_heads))
    for x in (q, k, v):
        x.requires_grad_()
    if kind == "ring":
        out = RingAttention.apply(q, k, v, None, group)
    else:
        mask = local_part(documents(), 2, group.size(), group.rank()) if kind == "documents" else None
        out = attend_all_gather(q, k, v, mask, None, group)
    out.backward(grad)
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("kind", ["ring", "all_gather", "documents"])
def test_every_rank_has_its_part_of_the_whole(kind: str, ranks: int) -> None:
    wanted = expected(HEADS if kind == "ring" else KV_HEADS, documents() if kind == "documents" else None)
    for rank, found in enumerate(run_ranks(shared, ranks, kind)):
        for name, mine, whole in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            part = local_part(whole, 2, ranks, rank)
            torch.testing.assert_close(
                torch.from_numpy(mine), part, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_chunks_pair_an_early_one_with_a_late_one() -> None:
    assert chunk_order(3) == [0, 5, 1, 4, 2, 3]
    assert local_part(torch.arange(12), 0, 3, 1).tolist() == [2, 3, 8, 9]
    with pytest.raises(ValueError, match="10 does not divide into 2 x cp = 4"):
        local_part(torch.arange(10), 0, 2, 0)


def test_positions_are_those_of_the_chunks() -> None:
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    angles = torch.arange(8.0)[:, None, None, None]
    assert rope_utils.get_pos_emb_on_this_cp_rank(angles, 0, group).flatten().tolist() == [2, 3, 4, 5]
