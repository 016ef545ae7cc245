"""The test of an arm against another, beside what others compute on the same numbers."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_smol.ablate.contrast import contrast, holm, noise_of

Arms = dict[str, dict[int, float]]


@st.composite
def tables(draw: st.DrawFn, least_arms: int = 2, most_arms: int = 5) -> Arms:
    seeds = draw(st.integers(2, 4))
    names = "abcde"[: draw(st.integers(least_arms, most_arms))]
    figures = st.floats(-5, 5).map(lambda x: round(x, 3))
    return {name: {seed: draw(figures) for seed in range(seeds)} for name in names}


@settings(deadline=None)
@given(tables(most_arms=2))
def test_two_arms_are_a_paired_t_test(arms: Arms) -> None:
    a, b = ([arms[name][seed] for seed in arms[name]] for name in "ab")
    found = contrast(arms["a"], arms["b"], noise_of(arms))
    assert found is not None and found.difference == pytest.approx(fmean(a) - fmean(b), abs=1e-12)
    differences = np.subtract(a, b)
    if np.ptp(differences) > 1e-6:
        assert found.p == pytest.approx(float(stats.ttest_rel(a, b).pvalue), rel=1e-6)
        assert found.error == pytest.approx(float(stats.sem(differences)), rel=1e-6)


@settings(deadline=None)
@given(tables(least_arms=3))
def test_noise_is_what_a_regression_on_arm_and_seed_leaves(arms: Arms) -> None:
    names, seeds = list(arms), list(arms["a"])
    cells = [(arm, seed) for arm in names for seed in seeds]
    design = np.array([[float(a == n) for n in names] + [float(s == k) for k in seeds[1:]] for a, s in cells])
    y = np.array([arms[arm][seed] for arm, seed in cells])
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    found = noise_of(arms)
    assert found is not None and found.freedom == len(y) - design.shape[1]
    assert found.deviation == pytest.approx(math.sqrt(float(left @ left) / found.freedom), abs=1e-9)


def test_what_seeds_cannot_tell_has_no_p() -> None:
    assert noise_of({"a": {0: 1.0}, "b": {0: 2.0}}) is None, "one seed"
    assert noise_of({"a": {0: 1.0, 1: 2.0}}) is None, "one arm"
    one = contrast({0: 2.0}, {0: 1.0}, None)
    assert one is not None and (one.difference, one.error, one.p) == (1.0, None, None)
    assert contrast({0: 1.0}, {1: 1.0}, None) is None, "no seed in common"
    unfinished = {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.1}, "c": {0: 9.0}}
    assert noise_of(unfinished) == noise_of({name: unfinished[name] for name in "ab"})


def test_holm() -> None:
    """The example of Holm's procedure with p 0.01, 0.04, 0.03, 0.005: 0.03, 0.06, 0.06, 0.02."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
