"""Gradients that products write into megatron-core's buffer are those that autograd gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_smol.model.gradients import Embedding, finish_products
from megatron_smol.train.step import Engine, _mean_loss
from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import Layout


def _in_buffer(engine: Engine, layout: Layout, step: int) -> dict[str, Tensor]:
    """What a step leaves in the buffer. The step is refused, so the weights stay."""
    engine.train_step(ranks.batches(step, layout), 1e-3, admit=lambda result: False)
    return {name: parameter.main_grad.clone() for name, parameter in engine.gpt.named_parameters()}


def _by_autograd(engine: Engine, layout: Layout, step: int) -> dict[str, Tensor]:
    """With megatron-core's own linear layers and embedding, as they are without any buffer."""
    gpt = engine.gpt
    for module in gpt.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = False
        if isinstance(module, Embedding):
            module.forward = super(Embedding, module).forward
    names, parameters = zip(*gpt.named_parameters(), strict=True)
    batches = ranks.batches(step, layout)
    means = [_mean_loss(gpt(batch.tokens, None, batch.mask, labels=batch.labels))[0] for batch in batches]
    return dict(zip(names, torch.autograd.grad(sum(means) / len(means), parameters), strict=True))


def _differences(tied: bool) -> dict[str, float]:
    layout = Layout(1, tied=tied, micro_batch=2)
    engine = ranks.engine(layout)
    _in_buffer(engine, layout, 1)  # leaves a buffer full of other numbers
    found, again = (_in_buffer(engine, layout, 2) for _ in range(2))
    expected = _by_autograd(engine, layout, 2)
    assert found.keys() == expected.keys() and all(float(g.abs().max()) > 0 for g in expected.values())
    away = {name: float((found[name] - g).norm() / g.norm()) for name, g in expected.items()}
    return away | {"again": max(float((found[name] - again[name]).abs().max()) for name in found)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_they_are_autograds(tied: bool) -> None:
    """Four micro-batches, in a buffer that another step has filled."""
    (away,) = run_ranks(_differences, 1, tied)
    assert away.pop("again") == 0
    assert max(away.values()) < 1e-5, away


def test_a_weight_without_a_product_has_no_gradient() -> None:
    reached, missed = torch.ones(2), torch.ones(2)
    reached.outdated, missed.outdated = False, True  # type: ignore[attr-defined]
    finish_products(SimpleNamespace(main_grad=grad) for grad in (reached, missed, torch.ones(2)))
    assert reached.tolist() == [1, 1] and missed.tolist() == [0, 0]
