"""Learning-rate shapes: exact at their ends, monotonic between, and the two schedules built from them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smol.train.schedule import SHAPES, StageDecay, WarmupStableDecay, glide

WSD = WarmupStableDecay(peak=3e-3, warmup=1000, decay_start=8000, decay_end=10_000, shape="linear", final=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_exact_at_both_ends_and_never_rise(shape: str) -> None:
    path = [glide(3e-3, 1e-4, x / 64, shape) for x in range(65)]
    assert path[0] == 3e-3 and path[-1] == 1e-4
    assert all(after < before for before, after in pairwise(path))
    assert glide(1.0, 0.0, -1, shape) == 1 and glide(1.0, 0.0, 2, shape) == 0


def test_shapes_midway() -> None:
    assert glide(1.0, 0.0, 0.5, "linear") == 0.5
    assert glide(1.0, 0.0, 0.5, "cosine") == pytest.approx(0.5)
    assert glide(1.0, 0.0, 0.25, "1-sqrt") == 0.5
    assert glide(1.0, 0.0, 0.25, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_warmup_stable_decay() -> None:
    assert WSD(0) == 0
    assert WSD(500) == 1.5e-3
    assert [WSD(tokens) for tokens in (1000, 5000, 8000)] == [3e-3] * 3
    assert WSD(9000) == 1.5e-3
    assert [WSD(tokens) for tokens in (10_000, 11_000)] == [0, 0]


def test_floor_is_held_after_the_decay() -> None:
    floor = WarmupStableDecay(1.0, 0, 10, 20, "cosine", 0.1)
    assert floor(0) == 1.0 and floor(20) == floor(99) == 0.1


def test_without_decay_the_peak_stays() -> None:
    assert WarmupStableDecay(1.0, 10, None, None, "linear", 0.0)(10**15) == 1.0


def test_stage_decay() -> None:
    stage = StageDecay(start=1e-3, end=0.0, start_tokens=100, end_tokens=200, shape="linear")
    assert (stage(100), stage(150), stage(200)) == (1e-3, 5e-4, 0)


@given(st.integers(1, 10**13), st.floats(1e-6, 1.0))
def test_warmup_ends_at_exactly_the_peak(warmup: int, peak: float) -> None:
    schedule = WarmupStableDecay(peak, warmup, 2 * warmup, 3 * warmup, "linear", 0.0)
    assert schedule(0) == 0
    assert schedule(warmup - 1) < peak == schedule(warmup) == schedule(2 * warmup)
    assert schedule(3 * warmup) == 0
