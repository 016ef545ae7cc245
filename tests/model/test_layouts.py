"""The law `parallel`: every layout trains like one process, from the same weights."""

from __future__ import annotations

from typing import Any

import pytest

from tests import ranks
from tests.helpers import run_ranks

STEPS = 20
ONE_PROCESS: dict[bool, Any] = {}


def one_process(tied: bool = True) -> Any:
    if tied not in ONE_PROCESS:
        ONE_PROCESS[tied] = run_ranks(ranks.curve, 1, 1, 1, False, STEPS, "fp32", tied)[0]
    return ONE_PROCESS[tied]


@pytest.mark.parametrize(
    ("world", "tp", "pp", "sequence_parallel"),
    [
        (2, 2, 1, False),
        (2, 1, 2, False),
        (2, 1, 1, False),
        (2, 2, 1, True),
        (4, 2, 2, True),
        (4, 1, 2, False),
    ],
    ids=["TP2", "PP2", "DP2", "TP2-SP", "TP2-PP2-SP", "PP2-DP2"],
)
def test_losses_equal_one_process(world: int, tp: int, pp: int, sequence_parallel: bool) -> None:
    curves = run_ranks(ranks.curve, world, tp, pp, sequence_parallel, STEPS)
    assert all(curve == curves[0] for curve in curves), "ranks report different losses"
    for found, expected in zip(curves[0], one_process(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    losses = [loss for loss, _ in curves[0]]
    assert losses[-1] < losses[0] - 0.5, "nothing was learnt, so equal losses say nothing"


def test_untied_embeddings_on_a_pipeline() -> None:
    curve = run_ranks(ranks.curve, 2, 1, 2, False, STEPS, "fp32", False)[0]
    for found, expected in zip(curve, one_process(tied=False), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_bf16_follows_fp32() -> None:
    curve = run_ranks(ranks.curve, 2, 2, 1, False, STEPS, "bf16")[0]
    assert curve != one_process(), "bf16 asked for, fp32 ran"
    for (found, _), (expected, _) in zip(curve, one_process(), strict=True):
        assert found == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_initial_weights_do_not_depend_on_the_layout(world: int, tp: int, pp: int) -> None:
    expected = run_ranks(ranks.initial_weights, 1, 1, 1)[0]
    found: dict[str, Any] = {}
    for part in run_ranks(ranks.initial_weights, world, tp, pp):
        for name, weight in part.items():
            assert found.setdefault(name, weight) == weight, f"{name} differs between ranks"
    assert found == expected
