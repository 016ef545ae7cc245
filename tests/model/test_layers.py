"""SwiGLU, norm, rotary positions, loss and clipping: the arithmetic of transformers and torch, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention as megatron_attention

from megatron_smol.data.batch import IGNORED
from megatron_smol.model import layers
from megatron_smol.model.layers import Nats, Normalization, Rotation, SwiGLU
from megatron_smol.train.optim import clip_gradients

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


def test_norm_is_torchs() -> None:
    x, weight = drawn(5, 2, 16), drawn(16) + 1
    assert torch.equal(Normalization.apply(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    assert torch.autograd.gradcheck(Normalization.apply, (x, weight, 1e-5))


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


def test_loss_is_torchs_and_labels_without_loss_give_no_gradient() -> None:
    logits, labels = (
        drawn(6, 2, 11).mul(4),
        torch.tensor([[0, 10], [3, IGNORED], [7, 1], [2, 2], [IGNORED, 5], [9, 4]]),
    )
    counted, share = labels != IGNORED, drawn(6, 2)
    plain = logits.clone().requires_grad_()
    expected = F.cross_entropy(plain.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    (expected * share).sum().backward()
    source = logits.clone().requires_grad_()
    found = Nats.apply((source * 1).flatten(0, 1), labels.flatten()).view(
        labels.shape
    )  # its input is used up
    (found.where(counted, 0) * share).sum().backward()
    torch.testing.assert_close(found[counted], expected[counted])
    torch.testing.assert_close(source.grad, plain.grad)
    assert not source.grad[~counted].any()


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_inside_adamw_is_clipping_before_it(limit: float) -> None:
    ours, plain = ([drawn(5, 7).requires_grad_(), drawn(3).requires_grad_()] for _ in range(2))
    for one, other in zip(ours, plain, strict=True):
        one.grad, other.grad = drawn(*one.shape), drawn(*one.shape)
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain])
    torch.nn.utils.clip_grad_norm_(plain, limit)
    first, second = (torch.optim.AdamW(parameters, 0.1, fused=True) for parameters in (ours, plain))
    clip_gradients(SimpleNamespace(optimizer=first, get_parameters=lambda: ours), limit, float(norm))
    first.step(), second.step()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            first.state[one]["exp_avg"], second.state[other]["exp_avg"], rtol=1e-5, atol=1e-8
        )
