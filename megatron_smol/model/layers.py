"""SwiGLU, RMSNorm, rotary positions and the loss for megatron-core's local layers, without the copies that autograd adds.

megatron-core fuses them on a GPU (Transformer Engine, torch.compile). Its plain SwiGLU and rotation cut a tensor in two
and join the halves again, forward and backward; here each half is written where it belongs. Same arithmetic, in the
same order, so the results are bit-equal to transformers' Llama. Its loss goes over the logits six times, because the
vocabulary may be split over ranks; where it is not, torch's goes twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class SwiGluMLP(MLP):
    """megatron-core's MLP with the activation below; weights, names and checkpoints are the same."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:  # [s, b, h] -> [s, b, h]
        gate_and_up, _bias = self.linear_fc1(hidden_states)  # [s, b, 2 f / tp]
        return self.linear_fc2(SwiGLU.apply(gate_and_up))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., 2 f] = [gate, up]; keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        both = torch.empty_like(gate_and_up)
        grad_gate, grad_up = both.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return both


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` for any layout (megatron-core's refuses sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        # Its gradient must be summed over tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        # torch has one kernel for it on a GPU, and on the CPU derives the backward pass of five small ones.
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return Normalization.apply(x, self.weight, self.eps)
        return super().forward(x)


class Normalization(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of [..., h]; keeps x and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        products = grad * normal
        grad_weight = products.flatten(0, -2).sum(0)
        # d normal / d x takes away the part of the gradient along `normal`, which its length of sqrt(h) cannot show.
        along = products.matmul(weight).div_(x.size(-1)).unsqueeze(-1)
        grad_x = torch.mul(grad, weight, out=products).addcmul_(normal, along, value=-1).mul_(scale)
        return grad_x, grad_weight, None


class Rotation(torch.autograd.Function):
    """Turn the pairs (x[i], x[i + d/2]) of each head by their angles; the gradient is turned back.

    x: [s, b, heads, d]; cos, sin: [s, 1 or b, 1, d / 2].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if x.dtype != torch.float32:
            return _turned(x, cos, sin, torch.empty_like(x, memory_format=torch.contiguous_format))
        # Lies in memory as [b, heads, s, d]: attention reads one head's tokens after another (in fp32; the CPU's bf16
        # kernel makes its own copies, and would keep both).
        tokens, batch, heads, dim = x.shape
        heads_first = torch.empty((batch, heads, tokens, dim), dtype=x.dtype, device=x.device)
        return _turned(x, cos, sin, heads_first.permute(2, 0, 1, 3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return (
            _turned(grad, cos, -sin, torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)),
            None,
            None,
        )


def _turned(x: Tensor, cos: Tensor, sin: Tensor, turned: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    out_first, out_second = turned.chunk(2, -1)
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    return turned


_apply_in_megatron = rope_utils.apply_rotary_pos_emb


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, config: Any, cu_seqlens: Tensor | None = None, **rest: Any
) -> Tensor:
    """megatron-core's function of this name, for what its local layers ask of it; the rest goes to it.

    t: [s, b, heads, d]; freqs: [s, 1, 1, d] angles, the two halves alike.
    """
    plain = cu_seqlens is None and freqs.size(-1) == t.size(-1)
    if not plain or config.apply_rope_fusion or config.rotary_interleaved or rest.get("mscale", 1.0) != 1.0:
        return _apply_in_megatron(t, freqs, config, cu_seqlens, **rest)
    cos, sin = _cos_sin(freqs, t.dtype)
    return Rotation.apply(t, cos, sin)


def _cos_sin(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computed once for a table of angles, which megatron-core keeps for each length, not once a layer."""
    known: dict[torch.dtype, tuple[Tensor, Tensor]] = freqs.__dict__.setdefault("cos_sin", {})
    if dtype not in known:
        half = freqs[..., : freqs.size(-1) // 2]
        known[dtype] = (half.cos().to(dtype), half.sin().to(dtype))
    return known[dtype]


megatron_attention.apply_rotary_pos_emb = apply_rotary_pos_emb


_loss_in_megatron = tensor_parallel.vocab_parallel_cross_entropy


def cross_entropy(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    """Nats of each token, [s, b]; logits: [s, b, vocabulary / tp]. megatron-core's function of another name."""
    if rest or parallel_state.get_tensor_model_parallel_world_size() > 1:
        return _loss_in_megatron(logits, labels, *rest)
    return Nats.apply(logits.flatten(0, 1).float(), labels.flatten()).view(labels.shape)


class Nats(torch.autograd.Function):
    """-log softmax(logits)[label] of [n, vocabulary] and [n]; works in the memory of the logits, which nobody else needs.

    A label outside of the vocabulary (data/batch.py's IGNORED) gives some number, whose gradient must be 0.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        places = labels.clamp(min=0).unsqueeze(1)
        log_shares = torch.ops.aten._log_softmax.out(logits, -1, False, out=logits)
        ctx.save_for_backward(log_shares, places)
        return -log_shares.gather(1, places).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        log_shares, places = ctx.saved_tensors
        grads = log_shares.exp_().mul_(grad.unsqueeze(1))
        return grads.scatter_add_(1, places, -grad.unsqueeze(1)), None


tensor_parallel.vocab_parallel_cross_entropy = cross_entropy
