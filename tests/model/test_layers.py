"""SwiGLU and rotary positions: the arithmetic of transformers' Llama, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention as megatron_attention

from megatron_smol.model import layers
from megatron_smol.model.layers import Rotation, SwiGLU

CONFIG = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)


def angles(length: int, dim: int) -> torch.Tensor:
    half = torch.outer(torch.arange(length).float(), 1 / 100 ** (torch.arange(0, dim, 2) / dim))
    return torch.cat([half, half], -1)[:, None, None]  # [s, 1, 1, d]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_silu_of_the_gate_times_up(dtype: torch.dtype) -> None:
    ours, plain = (drawn(5, 3, 16, dtype=dtype).requires_grad_() for _ in range(2))
    gate, up = plain.chunk(2, -1)
    (F.silu(gate) * up).backward(grad := drawn(5, 3, 8, dtype=dtype))
    out = SwiGLU.apply(ours)
    out.backward(grad)
    assert torch.equal(out, F.silu(gate) * up)
    assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_megatrons(dtype: torch.dtype) -> None:
    """On a view with gaps, as attention hands it over."""
    ours, plain = (drawn(6, 2, 3, 2, 8, dtype=dtype).requires_grad_() for _ in range(2))
    grad = drawn(6, 2, 2, 8, dtype=dtype)
    expected = rope_utils._apply_rotary_pos_emb_bshd(plain[:, :, 1], angles(6, 8))
    expected.backward(grad)
    found = layers.apply_rotary_pos_emb(ours[:, :, 1], angles(6, 8), CONFIG)
    found.backward(grad)
    assert torch.equal(found, expected)
    assert torch.equal(ours.grad, plain.grad)


def test_gradients_are_those_of_the_definition() -> None:
    x, freqs = drawn(3, 1, 2, 4).double().requires_grad_(), angles(3, 4).double()[..., :2]
    assert torch.autograd.gradcheck(Rotation.apply, (x, freqs.cos(), freqs.sin()))
    assert torch.autograd.gradcheck(SwiGLU.apply, (drawn(3, 2, 6).double().requires_grad_(),))


def test_megatron_uses_it() -> None:
    assert megatron_attention.apply_rotary_pos_emb is layers.apply_rotary_pos_emb


def test_interleaved_pairs_go_to_megatron() -> None:
    x, config = drawn(6, 2, 2, 8), SimpleNamespace(**vars(CONFIG) | {"rotary_interleaved": True})
    expected = rope_utils._apply_rotary_pos_emb_bshd(x, angles(6, 8), rotary_interleaved=True)
    found = layers.apply_rotary_pos_emb(x, angles(6, 8), config, cp_group=object())
    assert torch.equal(found, expected)


def test_a_new_table_of_angles_is_not_taken_for_an_old_one() -> None:
    x = drawn(6, 1, 1, 8)
    first, second = angles(6, 8), angles(6, 8) * 0.5
    results = [layers.apply_rotary_pos_emb(x, table, CONFIG) for table in (first, second, first)]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
