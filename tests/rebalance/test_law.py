"""Mixture laws find the curve that made the losses, and own up where they cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_smol.rebalance.law import Point, fit

GRID = [{"a": x, "b": y, "c": 1 - x - y} for x in (0.0, 0.2, 0.4, 0.6) for y in (0.0, 0.15, 0.3)]


def exponential(weights: dict[str, float]) -> float:
    return 1.5 + 2.0 * math.exp(-3.0 * weights["a"] + 0.8 * weights["b"])


def test_an_exponential_is_found_and_predicts_unseen_mixtures() -> None:
    law = fit([(weights, exponential(weights)) for weights in GRID])
    assert law is not None and (law.kind, law.arms, law.directions) == ("exponential", 12, 2)
    assert law.left_out_error < 1e-4 and law.holds
    unseen = {"a": 0.33, "b": 0.22, "c": 0.45}
    assert law.predict(unseen) == pytest.approx(exponential(unseen), abs=1e-4) and law.has_seen(unseen)
    assert not law.has_seen({"a": 0.9, "b": 0.1}) and not law.has_seen({"a": 0.5, "d": 0.5})


def test_few_arms_get_a_line() -> None:
    points: list[Point] = [({"a": x, "b": 1 - x}, 3 - x) for x in (0.0, 0.2, 0.4, 0.7)]
    law = fit(points)
    assert law is not None and law.kind == "linear" and law.left_out_error < 1e-9
    assert law.predict({"a": 0.5, "b": 0.5}) == pytest.approx(2.5)


def test_the_error_is_that_on_arms_left_out() -> None:
    """For a straight line it has a closed form: residual / (1 - leverage) (Allen's PRESS)."""
    x, y = np.array([0.0, 0.2, 0.5, 0.9]), np.array([3.0, 2.6, 2.7, 1.9])
    law = fit([({"a": a, "b": 1 - a}, loss) for a, loss in zip(x.tolist(), y.tolist(), strict=True)])
    design = np.column_stack([np.ones(4), x])
    hat = design @ np.linalg.pinv(design)
    left = (y - hat @ y) / (1 - np.diag(hat))
    assert law is not None and law.left_out_error == pytest.approx(float(np.sqrt(np.mean(left**2))))


def test_losses_that_do_not_follow_the_mixture_make_no_law() -> None:
    law = fit([(weights, 3 + (i * 7919 % 13) / 13) for i, weights in enumerate(GRID)])
    assert law is not None and not law.holds and law.left_out_error > law.mean_error / 2


@pytest.mark.parametrize("arms", [0, 1, 3])
def test_too_few_arms_make_none(arms: int) -> None:
    """One share of each candidate: as many arms as directions and one, all of them needed for the fit."""
    points: list[Point] = [({"a": 1.0}, 3.0), ({"a": 0.4, "b": 0.6}, 2.0), ({"a": 0.4, "c": 0.6}, 4.0)]
    assert fit(points[:arms]) is None
