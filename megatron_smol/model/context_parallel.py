"""Attention over a sequence that several ranks share (context parallel), without Transformer Engine.

The window is cut into 2 * cp chunks and rank r holds chunks r and 2 * cp - 1 - r, so that causal attention costs
every rank the same (megatron-core's and Transformer Engine's layout). Two ways to bring keys to queries:

all_gather: every rank gathers all keys and values of the layer; simple, and takes any mask.
ring: keys and values travel from rank to rank and partial results are merged by their log-sum-exp, so that no rank
ever holds the whole sequence (Liu et al. 2023, arXiv 2310.01889; the zigzag order of chunks is Megatron's).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

_ops = torch.ops.aten


def chunk_order(cp: int) -> list[int]:
    """Chunk numbers in the order in which the ranks hold them: rank 0's two, rank 1's two, ..."""
    return [chunk for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)]


def local_part(x: Tensor, dim: int, cp: int, rank: int) -> Tensor:
    """This rank's two chunks of `x` along `dim`, back to back."""
    if x.size(dim) % (2 * cp):
        raise ValueError(f"a length of {x.size(dim)} does not divide into 2 x cp = {2 * cp} chunks")
    chunks = x.chunk(2 * cp, dim)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]], dim)


def attend_all_gather(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, group: ProcessGroup
) -> Tensor:
    """q: [b, heads, s / cp, d]; k, v: [b, kv_heads, s / cp, d], local chunks; mask: [b, 1, s / cp, s] or None: causal.

    Returns [b, heads, s / cp, d].
    """
    cp, rank = group.size(), group.rank()
    keys, values = (_gathered(x, group) for x in (k, v))
    half = q.size(2) // 2
    parts = []
    for index, chunk in enumerate((rank, 2 * cp - 1 - rank)):
        mine = slice(index * half, (index + 1) * half)
        seen = (chunk + 1) * half  # a chunk sees nothing after its own end
        if mask is None:
            allowed = torch.ones(half, seen, dtype=torch.bool, device=q.device).tril(chunk * half)
        else:
            allowed = mask[:, :, mine, :seen]
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, mine],
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=allowed,
                scale=scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        )
    return torch.cat(parts, 2)


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """[b, h, s / cp, d] local chunks -> [b, h, s, d] in natural order; the gradient is summed and scattered."""
    gathered = gather_from_sequence_parallel_region(x.permute(2, 0, 1, 3).contiguous(), group=group)
    chunks = gathered.chunk(2 * group.size())
    places = sorted(range(2 * group.size()), key=chunk_order(group.size()).__getitem__)
    return torch.cat([chunks[place] for place in places]).permute(1, 2, 0, 3)


class RingAttention(torch.autograd.Function):
    """Causal attention of local queries to the keys of all ranks of `group`.

    q, k, v: [b, heads, s / cp, d] local chunks with as many key as query heads. At turn i a rank holds the keys of
    rank j = r - i. Its own (i = 0) are an ordinary causal problem; of an earlier rank's it needs the first chunk, for
    all its queries; of a later rank's both chunks, for the second half of its queries.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, group: ProcessGroup
    ) -> Tensor:
        out, lse = _kernel(q, k, v, True, scale)
        out = out.float()
        for source, keys, values in _visits(group, k.contiguous(), v.contiguous()):
            mine, theirs = _needed(group.rank(), source, q.size(2))
            part, part_lse = _kernel(q[:, :, mine], keys[:, :, theirs], values[:, :, theirs], False, scale)
            _merge(out[:, :, mine], lse[:, :, mine], part, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.group = scale, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        group: ProcessGroup = ctx.group
        grad = grad.contiguous()
        own = _kernel_backward(grad, q, k, v, out, lse, True, ctx.scale)
        dq, dk, dv = (x.float().contiguous() for x in own)
        for source, keys, values in _visits(group, k.contiguous(), v.contiguous()):
            # The gradients of keys travel along with the keys, and come home with the last turn.
            dk, dv = _passed_on(group, dk, dv)
            mine, theirs = _needed(group.rank(), source, q.size(2))
            q_part, out_part, lse_part = (x[:, :, mine] for x in (q, out, lse))
            k_part, v_part = keys[:, :, theirs], values[:, :, theirs]
            part = _kernel_backward(
                grad[:, :, mine], q_part, k_part, v_part, out_part, lse_part, False, ctx.scale
            )
            dq[:, :, mine] += part[0]
            dk[:, :, theirs] += part[1]
            dv[:, :, theirs] += part[2]
        dk, dv = _passed_on(group, dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _needed(rank: int, source: int, length: int) -> tuple[slice, slice]:
    """Which of its queries rank `rank` lets look at which keys of rank `source` (not itself)."""
    everything, half = slice(0, length), length // 2
    return (everything, slice(0, half)) if source < rank else (slice(half, length), everything)


def _visits(group: ProcessGroup, keys: Tensor, values: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(rank they belong to, keys, values) of every other rank, one after another."""
    for turn in range(1, group.size()):
        keys, values = _passed_on(group, keys, values)
        yield (group.rank() - turn) % group.size(), keys, values


def _passed_on(group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Send tensors to the next rank of the ring, and return what the one before sent."""
    after = torch.distributed.get_global_rank(group, (group.rank() + 1) % group.size())
    before = torch.distributed.get_global_rank(group, (group.rank() - 1) % group.size())
    received = tuple(torch.empty_like(x) for x in tensors)
    send, receive, move = torch.distributed.isend, torch.distributed.irecv, torch.distributed.P2POp
    moves = [move(send, x, after, group, tag) for tag, x in enumerate(tensors)]
    moves += [move(receive, x, before, group, tag) for tag, x in enumerate(received)]
    for work in torch.distributed.batch_isend_irecv(moves):
        work.wait()
    return received


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a partial softmax to `out` [b, h, n, d] with log-sum-exp `lse` [b, h, n], in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp().unsqueeze(-1)).add_(part * (part_lse - total).exp().unsqueeze(-1))
    lse.copy_(total)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """torch's flash attention for the CPU, with its log-sum-exp."""
    return _ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _kernel_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of one block, given the output and log-sum-exp over all blocks."""
    return _ops._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _angles_of_this_rank(pos_emb: Tensor, seq_dim: int, cp_group: ProcessGroup) -> Tensor:
    """megatron-core's `get_pos_emb_on_this_cp_rank`, which needs a GPU for an index of two numbers."""
    return local_part(pos_emb, seq_dim, cp_group.size(), cp_group.rank())


rope_utils.get_pos_emb_on_this_cp_rank = _angles_of_this_rank
rotary_pos_embedding.get_pos_emb_on_this_cp_rank = _angles_of_this_rank
