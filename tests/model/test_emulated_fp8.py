"""FP8 rounding on a CPU: each scaling against a plain reference, and what it does to a model that trains."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_smol.checkpoint import folder, store
from megatron_smol.checkpoint.dist import StoredWeights
from megatron_smol.checkpoint.weights import weight_map
from megatron_smol.model import emulated_fp8
from megatron_smol.model.precision import precision
from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import Layout

ONE = Layout(1, micro_batch=4)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def nearest(value: float, kind: torch.dtype) -> float:
    """The nearest number of the format, by looking at all 256 of them."""
    if kind not in TABLES:
        every = torch.arange(256, dtype=torch.uint8).view(kind).float()
        TABLES[kind] = [number for number in every.tolist() if math.isfinite(number)]
    return min(TABLES[kind], key=lambda number: abs(number - value))


TABLES: dict[torch.dtype, list[float]] = {}


def reference(x: Tensor, scale: Any, kind: torch.dtype) -> Tensor:
    """x rounded number by number; scale(i, j) of each."""
    rows, columns = x.shape
    return torch.tensor(
        [
            [nearest(float(x[i, j]) * scale(i, j), kind) / scale(i, j) for j in range(columns)]
            for i in range(rows)
        ]
    )


def fields(name: str) -> dict[str, Any]:
    found = precision(f"emulated-fp8-{name}").emulated
    assert found is not None
    return found


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    # Magnitudes over five orders, so that small numbers fall below the format's smallest.
    return torch.randn(shape, generator=generator) * 10 ** (5 * torch.rand(shape, generator=generator) - 4)


@pytest.mark.parametrize(
    ("operand", "kind"), [("input", torch.float8_e4m3fn), ("gradient", torch.float8_e5m2)]
)
def test_tensorwise_is_one_scale_from_the_tensors_own_magnitude(operand: str, kind: torch.dtype) -> None:
    x = random(9, 20)
    scale = LARGEST[kind] / float(x.abs().max())
    found = emulated_fp8.rounding_of(fields("tensorwise"), nn.Module()).round(operand, x, 1)
    torch.testing.assert_close(found, reference(x, lambda i, j: scale, kind), rtol=1e-6, atol=0)
    assert torch.equal(found.abs().max(), x.abs().max())


@pytest.mark.parametrize("operand", ["input", "weight", "gradient"])
@pytest.mark.parametrize("inner", [0, 1])
def test_blockwise_is_a_power_of_two_a_block_along_the_inner_dimension(operand: str, inner: int) -> None:
    x = random(131, 140)
    height, width = (128, 128) if operand == "weight" else ((128, 1), (1, 128))[inner]

    def scale(i: int, j: int) -> float:
        top, left = i // height * height, j // width * width
        block = x[top : top + height, left : left + width]
        return float(2 ** math.floor(math.log2(448.0 / float(block.abs().max()))))

    found = emulated_fp8.rounding_of(fields("blockwise"), nn.Module()).round(operand, x, inner)
    expected = reference(x[:, :5], scale, torch.float8_e4m3fn)  # number by number takes its time
    torch.testing.assert_close(found[:, :5], expected, rtol=1e-6, atol=0)


def _delayed() -> None:
    ranks.engine(ONE)  # the ranks that share a magnitude
    given = {**fields("delayed"), "fp8_amax_history_len": 4}
    rounding = emulated_fp8.rounding_of(given, module := nn.Module())
    history: deque[float] = deque(maxlen=4)
    for size in (1.0, 50.0, 2.0, 0.5, 0.1, 0.1, 0.2):
        x = size * random(3, 8)
        scale = LARGEST[torch.float8_e5m2] / max(history) if history else 1.0
        found = rounding.round("gradient", x, 1)
        clipped = x.clamp(-LARGEST[torch.float8_e5m2] / scale, LARGEST[torch.float8_e5m2] / scale)
        expected = reference(clipped, lambda i, j, scale=scale: scale, torch.float8_e5m2)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        rounding.remember("gradient", x)
        history.append(float(x.abs().max()))
    assert module.fp8_amax_history[2].tolist() == pytest.approx(list(history))
    assert not module.fp8_amax_history[:2].any()


def test_delayed_is_one_scale_from_the_history_and_cuts_off_what_is_beyond() -> None:
    run_ranks(_delayed, 1)


def test_the_three_products_take_rounded_operands() -> None:
    x, weight, grad = random(2, 64, 48).requires_grad_(), random(80, 48).requires_grad_(), random(2, 64, 80)
    rounding = emulated_fp8.rounding_of(fields("blockwise"), nn.Module())
    out = emulated_fp8._Products.apply(x, weight, rounding, True)
    out.backward(grad)
    rows, g = x.detach().flatten(0, 1), grad.flatten(0, 1)
    w = rounding.round("weight", weight.detach(), 1)
    assert torch.equal(out.flatten(0, 1), rounding.round("input", rows, 1) @ w.t())
    assert x.grad is not None and weight.grad is not None
    assert torch.equal(x.grad.flatten(0, 1), rounding.round("gradient", g, 1) @ w)
    assert torch.equal(weight.grad, rounding.round("gradient", g, 0).t() @ rounding.round("input", rows, 0))


NAMES = ("bf16", "emulated-fp8-tensorwise", "emulated-fp8-delayed", "emulated-fp8-blockwise")
STEPS = 24


def _trained() -> dict[str, tuple[list[float], float]]:
    """Loss of each step, and how far an outlier that comes at once moves the loss from where bf16 says it is."""
    found = {}
    for name in NAMES:
        running = ranks.engine(ONE, name)
        losses = [loss for loss, _ in ranks.train(running, ONE, 0, STEPS)]
        with torch.no_grad():
            running.gpt.decoder.layers[3].pre_mlp_layernorm.weight[5] *= 200.0
        found[name] = (losses, ranks.validate(running, ONE))
    return found


def test_a_model_trains_under_each_and_an_outlier_hurts_delayed_most() -> None:
    found = run_ranks(_trained, 1)[0]
    plain, moved = found.pop("bf16")
    assert plain[-1] < plain[0] - 0.5
    for name, (losses, _) in found.items():
        assert losses != plain, name
        assert losses[-1] == pytest.approx(plain[-1], rel=0.03), name
    error = {name.removeprefix("emulated-fp8-"): abs(loss - moved) for name, (_, loss) in found.items()}
    assert error["delayed"] > 3 * error["blockwise"], error


def _layers() -> dict[str, list[list[bool]]]:
    """Which linears of each layer round, by precision."""
    found = {}
    for name in NAMES:
        layers = ranks.engine(ONE, name).gpt.decoder.layers
        found[name] = [
            ["_forward_impl" in vars(m) for m in layer.modules() if hasattr(m, "_forward_impl")]
            for layer in layers
        ]
    return found


def test_no_layer_is_touched_unless_asked_and_tensorwise_spares_the_first_and_the_last() -> None:
    found = run_ranks(_layers, 1)[0]
    none, all_four = [False] * 4, [True] * 4
    assert found["bf16"] == [none] * 8
    assert found["emulated-fp8-tensorwise"] == [none, *[all_four] * 6, none]
    assert found["emulated-fp8-delayed"] == found["emulated-fp8-blockwise"] == [all_four] * 8


def _saved_and_resumed(where: str, layout: Layout, before: str, after: str) -> Any:
    """(curve after a save, curve of another engine from there)."""
    running = ranks.engine(layout, before)
    ranks.train(running, layout, 0, 3)
    ranks.save(running, where)
    resumed = ranks.engine(layout, after)
    store.load(resumed, folder.read_checkpoint(Path(where)))
    stored = StoredWeights(Path(where))
    stored.require(weight_map(running.recipe.model))
    return ranks.train(running, layout, 3, 6), ranks.train(resumed, layout, 3, 6)


@pytest.mark.parametrize("layout", [ONE, Layout(2, {"tp": 2, "sequence_parallel": True})], ids=["one", "tp2"])
def test_a_resumed_run_rounds_as_one_that_went_on(tmp_path: Path, layout: Layout) -> None:
    name = "emulated-fp8-delayed"
    for went_on, resumed in run_ranks(
        _saved_and_resumed, layout.ranks, str(tmp_path / "a"), layout, name, name
    ):
        assert went_on == resumed


@pytest.mark.parametrize("name", NAMES[1:])
def test_precision_changes_to_and_from_it(tmp_path: Path, name: str) -> None:
    for before, after in (("bf16", name), (name, "bf16")):
        where = str(tmp_path / before)
        [(went_on, changed)] = run_ranks(_saved_and_resumed, 1, where, ONE, before, after)
        assert went_on != changed
        assert [loss for loss, _ in changed] == pytest.approx([loss for loss, _ in went_on], rel=2e-2)
