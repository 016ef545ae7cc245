"""The proportion law, exact weights, and Megatron's own blend to the bit."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers as megatron_helpers

from megatron_smol import _csrc
from megatron_smol.data.blend import MAX_PERIOD, Blend, build_blending_indices, exact_weights
from megatron_smol.errors import UserError

from . import oracle


def worst_deviation(numerators: list[int]) -> Fraction:
    """Largest |count - weight x n| over all prefixes of one period, in exact integers."""
    source, _ = _csrc.blend_period(numerators)
    period = len(source)
    slots = np.arange(1, period + 1, dtype=np.int64)
    worst = 0
    for index, numerator in enumerate(numerators):
        count = np.cumsum(source == index, dtype=np.int64)
        worst = max(worst, int(np.abs(count * period - slots * numerator).max()))
        assert count[-1] == numerator
    return Fraction(worst, period)


def random_numerators(rng: random.Random, most: int = 3000) -> list[int]:
    """1 to 64 sources; often a few giants among tiny ones, which is where greedy orders fail."""
    sources = rng.choice([1, 2, 3, 5, 8, 20, 64])
    scale = rng.choice([1, 4, most // sources])
    numerators = [rng.randint(0 if sources > 1 else 1, max(1, scale)) for _ in range(sources)]
    if rng.random() < 0.5:
        numerators[rng.randrange(sources)] = rng.randint(1, most)
    return numerators if any(numerators) else [1, *numerators[1:]]


def test_each_count_stays_within_one_sample_of_its_share() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        numerators = random_numerators(rng)
        assert worst_deviation(numerators) < 1, numerators


def test_tiny_weights_and_a_full_period() -> None:
    assert worst_deviation([2, 4998]) < 1  # 0.0004 and the rest
    assert worst_deviation([1] * 63 + [MAX_PERIOD - 63]) < 1
    assert worst_deviation([1]) == 0


def test_proportion_holds_where_greedy_largest_error_does_not() -> None:
    # Megatron's order lets a source run 1.5 samples ahead here; ours never strays by one.
    weights = {"big": "0.5", "middle": "0.3", **{f"s{i:02}": "0.005" for i in range(40)}}
    exact = exact_weights(weights)
    source, _ = build_blending_indices([float(w) for w in exact.values()], 1000)
    n = np.arange(1, 1001)
    greedy = max(np.abs(np.cumsum(source == i) - n * float(w)).max() for i, w in enumerate(exact.values()))
    assert greedy > 1
    assert worst_deviation(Blend(exact).numerators) < 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.integers(0, 200))
def test_blend_agrees_with_the_oracle(numerators: list[int], samples: int) -> None:
    total = sum(numerators)
    weights = {f"s{i}": Fraction(a, total) for i, a in enumerate(numerators)}
    blend = Blend(weights)
    source, ordinal = blend.lookup(0, samples)
    turns = oracle.blend(weights, samples)
    assert [blend.names[s] for s in source] == turns
    assert ordinal.tolist() == [turns[:i].count(turns[i]) for i in range(samples)]
    assert blend.counts(samples) == {name: turns.count(name) for name in weights}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=20).filter(any),
    st.integers(0, 2**61),
    st.integers(0, 500),
)
def test_random_access_far_into_a_run(numerators: list[int], start: int, length: int) -> None:
    total = sum(numerators)
    blend = Blend({f"s{i:02}": Fraction(a, total) for i, a in enumerate(numerators)})
    source, ordinal = blend.lookup(start, start + length)
    count = list(blend.counts(start).values())
    for s, o in zip(source.tolist(), ordinal.tolist(), strict=True):
        assert o == count[s]
        count[s] += 1
    assert count == list(blend.counts(start + length).values())
    assert all(
        abs(c - blend.numerators[i] * (start + length) / Fraction(blend.period)) < 1
        for i, c in enumerate(count)
    )


def test_order_does_not_depend_on_how_the_recipe_lists_the_sources() -> None:
    weights = exact_weights({"web": 0.6, "code": 0.25, "math": 0.15})
    again = dict(reversed(weights.items()))
    assert Blend(weights).names == Blend(again).names
    assert np.array_equal(Blend(weights).lookup(0, 500)[0], Blend(again).lookup(0, 500)[0])


def test_decimals_are_exact() -> None:
    weights = exact_weights({"a": 0.1, "b": "0.2", "c": Fraction(7, 10)})
    assert weights == {"a": Fraction(1, 10), "b": Fraction(1, 5), "c": Fraction(7, 10)}
    assert exact_weights({"a": 0.0002, "b": 0.9998})["a"] == Fraction(1, 5000)
    assert exact_weights({"only": 1}) == {"only": 1}


def test_thirds_typed_with_seven_digits_are_thirds() -> None:
    assert set(exact_weights({"a": 0.3333333, "b": 0.3333333, "c": 0.3333333}).values()) == {Fraction(1, 3)}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=70), st.integers(0, 3))
def test_awkward_weights_are_rounded_and_still_sum_to_one(raw: list[float], zeros: int) -> None:
    exact = [Fraction(x) / sum(map(Fraction, raw)) for x in raw] + [Fraction(0)] * zeros
    rounded = exact_weights({f"s{i}": weight for i, weight in enumerate(exact)})
    assert sum(rounded.values()) == 1
    tiny = sum(0 < weight < Fraction(1, MAX_PERIOD) for weight in exact)
    for asked, got in zip(exact, rounded.values(), strict=True):
        assert (got == 0) == (asked == 0)
        assert got == 0 or got >= Fraction(1, MAX_PERIOD)
        assert abs(got - asked) < Fraction(1 + tiny, MAX_PERIOD)
    assert Blend(rounded).period <= MAX_PERIOD
    assert exact_weights(rounded) == rounded


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"web": 0.6, "code": 0.5}, r"sum to 1, but sum to 1\.1 \(web 0\.6, code 0\.5\)"),
        ({"web": 0.999}, "sum to 0.999"),
        ({"web": "lots"}, "weight of source 'web' must be a number"),
        ({"web": float("nan")}, "weight of source 'web' must be a number"),
        ({"web": 1.5, "code": -0.5}, "weight of source 'web' must lie between 0 and 1, got 1.5"),
        ({}, "no source"),
    ],
)
def test_bad_weights_are_named(weights: dict[str, float | str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        exact_weights(weights)


def test_arguments_are_checked_before_memory_is_touched() -> None:
    blend = Blend({"a": Fraction(1)})
    with pytest.raises(ValueError, match="not a range"):
        blend.lookup(-1, 3)
    with pytest.raises(ValueError, match="not a range"):
        blend.lookup(5, 3)
    with pytest.raises(ValueError, match="unknown source"):
        _csrc.blend_lookup(np.array([7], np.uint16), np.array([0], np.int32), [1], 0, 1)
    for numerators in ([], [0, 0], [-1, 2], [2**40]):
        with pytest.raises(ValueError, match=r"numerators|sources"):
            _csrc.blend_period(numerators)
    with pytest.raises(ValueError, match="negative"):
        build_blending_indices([1.0], -1)
    with pytest.raises(ValueError, match="weights"):
        build_blending_indices([], 1)
    with pytest.raises(UserError, match="exact_weights"):
        Blend({"a": Fraction(1, 2)})


def test_build_blending_indices_is_bit_equal_to_megatron_core() -> None:
    rng = np.random.default_rng(0)
    for case in range(200):
        sources = int(rng.choice([1, 2, 3, 7, 30, 200]))
        weights = rng.dirichlet(np.full(sources, rng.choice([0.05, 1.0, 50.0])))
        if case % 4 == 0:  # round decimals make ties
            weights = np.maximum(np.round(weights, 2), 0.01)
            weights /= weights.sum()
        size = int(rng.integers(0, 4000))
        expected = np.zeros(size, np.int16), np.zeros(size, np.int64)
        megatron_helpers.build_blending_indices(*expected, weights, sources, size, False)
        source, ordinal = build_blending_indices(weights.tolist(), size)
        assert source.dtype == np.int16 and ordinal.dtype == np.int64
        assert np.array_equal(source, expected[0]), case
        assert np.array_equal(ordinal, expected[1]), case
