"""What a picture must keep of millions of steps, and that the page does not grow with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.report import training
from megatron_smol.report.collect import RunRecord, StageRun
from megatron_smol.report.downsample import binned, extremes, running_mean
from megatron_smol.report.metrics import Series


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3000), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_each_column_keeps_its_extremes_and_the_curve_its_ends(n: int, columns: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    x = np.cumsum(noise.integers(1, 50, n)).astype(float)
    y = noise.normal(size=n)
    kept_x, kept_y = extremes(x, y, x[0], x[-1], columns)
    assert len(kept_x) <= 2 * columns + 2
    assert (kept_x[0], kept_y[0], kept_x[-1], kept_y[-1]) == (x[0], y[0], x[-1], y[-1])
    assert (np.diff(kept_x) > 0).all()
    assert set(zip(kept_x, kept_y, strict=True)) <= set(zip(x, y, strict=True))
    edges = np.linspace(x[0], x[-1], columns + 1)
    inner = [(edges[i], edges[i + 1] if i < columns - 1 else np.inf) for i in range(columns)]
    for low, high in inner:
        column, kept = y[(x >= low) & (x < high)], kept_y[(kept_x >= low) & (kept_x < high)]
        if len(column):
            assert (kept.min(), kept.max()) == (column.min(), column.max())


def test_what_is_not_a_number_is_left_out() -> None:
    x, y = np.arange(5000.0), np.ones(5000)
    y[[0, 77, 4999]] = np.nan
    y[2500] = np.inf
    kept_x, kept_y = extremes(x, y, 0, 4999, 10)
    assert np.isfinite(kept_y).all()
    assert (kept_x[0], kept_x[-1]) == (1, 4998)
    assert np.isfinite(binned(x, y, 100)[1]).all()


def test_binning_keeps_the_ends_and_the_mean() -> None:
    x, y = binned(range(1, 10_001), range(10_000), points=100)
    assert len(x) == 100
    assert x[-1] == 10_000
    assert np.mean(y) == pytest.approx(4999.5)
    assert list(binned([1, 2], [3, 4], points=5)[1]) == [3, 4]


def test_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert running_mean([0, 3, 6, 9], 1).tolist() == [1.5, 3, 6, 7.5]
    assert running_mean([5.0], 3).tolist() == [5.0]


def run_of(steps: int) -> RunRecord:
    step = np.arange(1, steps + 1)
    ones = np.ones(steps)
    loss = 3 + np.sin(step / 1000)
    loss[steps // 2] = 9.5  # one spike, which must be seen
    drawn = {"web": np.full(steps, 9, np.int32), "math": np.full(steps, 1, np.int32)}
    series = Series(step, step * 1280, loss, ones, ones, ones, ones, ones > 0, drawn)
    stage = StageRun("s", 0, end_step=steps, end_tokens=steps * 1280, series=series)
    return RunRecord(Path(), "r", None, [stage], [], [], [], {}, "", None, [], label="r")


def test_two_million_steps_are_a_few_thousand_points_and_no_spike_is_lost() -> None:
    run = run_of(2_000_000)
    for chart in (training.loss([run], []), training.learning_rate([run]), training.gradient_norm([run], [])):
        assert all(len(line.x) <= 2_002 for line in chart.lines)
    faint = training.loss([run], []).lines[0]
    assert max(faint.y) == 9.5
    assert (faint.x[0], faint.x[-1]) == (1280, 2_000_000 * 1280)
    assert len(training.mixture(run).to_json()["lines"]) == 0  # no source was planned or named
