"""The order law: rows depend on the data section, the seed and the sample number, and on nothing else."""

from __future__ import annotations

import pickle
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data.order import Cursor, SourceOrder
from megatron_smol.data.stream import Rows, StageStream

from . import oracle
from .plans import Plan, Stage, plans

Row = tuple[str, int, int]


def listed(rows: Rows) -> list[Row]:
    """(source name, epoch, window) of each row."""
    names = [rows.names[index] for index in rows.source]
    return list(zip(names, rows.epoch.tolist(), rows.window.tolist(), strict=True))


def read_plainly(plan: Plan, stage: Stage) -> tuple[list[list[Row]], list[dict[str, int]]]:
    """The oracle's rows of every stage from the root to `stage`, and the tokens skipped when each began."""
    sources = {n: oracle.Source(n, o.tokens, o.page_length, o.seed) for n, o in plan.orders.items()}
    read, skipped = [], []
    for step, samples in plan.lineage(stage):
        skipped.append({name: sources[name].enter(step.seq_length) for name in step.weights})
        turns = oracle.blend(step.weights, samples)
        read.append([(name, *sources[name].read()) for name in turns])
    return read, skipped


@settings(max_examples=100, deadline=None)
@given(plans())
def test_whole_runs_agree_with_the_oracle_along_every_lineage(plan: Plan) -> None:
    for leaf in plan.stages:
        rows, skipped = read_plainly(plan, leaf)
        for (stage, samples), expected, gaps in zip(plan.lineage(leaf), rows, skipped, strict=True):
            assert listed(StageStream(stage, plan.orders).rows(0, samples)) == expected
            assert {name: stage.skipped_tokens[name] for name in gaps} == gaps


def big_stage() -> tuple[Stage, dict[str, SourceOrder]]:
    orders = {
        name: SourceOrder(name, tokens, 8192, 8)
        for name, tokens in {"web": 10**12, "code": 10**9, "math": 10**6 + 7}.items()
    }
    weights = {"web": Fraction(17, 20), "code": Fraction(1499, 10000), "math": Fraction(1, 10000)}
    cursors = {
        name: Cursor(2048, position) for name, position in {"web": 10**8, "code": 5, "math": 0}.items()
    }
    return Stage("stable", 2048, weights, cursors), orders


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_rows_do_not_depend_on_how_they_are_asked_for(start: int, cuts: list[int]) -> None:
    stage, orders = big_stage()
    stream = StageStream(stage, orders)
    whole = listed(stream.rows(start, start + sum(cuts)))
    pieces, at = [], start
    for cut in cuts:
        pieces += listed(StageStream(stage, orders).rows(at, at + cut))
        at += cut
    assert pieces == whole
    assert [listed(stream.rows(i, i + 1))[0] for i in range(start, start + min(sum(cuts), 20))] == whole[:20]


def test_a_pickled_stream_gives_the_same_rows() -> None:
    stream = StageStream(*big_stage())
    again = pickle.loads(pickle.dumps(stream))
    assert listed(again.rows(10**9, 10**9 + 500)) == listed(stream.rows(10**9, 10**9 + 500))


def test_threads_share_a_stream() -> None:
    stream = StageStream(*big_stage())
    expected = listed(stream.rows(0, 20_000))
    found: dict[int, list[Row]] = {}

    def read(part: int) -> None:
        found[part] = listed(stream.rows(part * 5000, part * 5000 + 5000))

    threads = [threading.Thread(target=read, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row for part in range(4) for row in found[part]] == expected


def test_seed_and_name_change_the_order() -> None:
    stage, orders = big_stage()
    stream = StageStream(stage, orders)
    reseeded = {n: SourceOrder(n, o.tokens, o.page_length, 9) for n, o in orders.items()}
    first, other = stream.rows(0, 1000), StageStream(stage, reseeded).rows(0, 1000)
    assert np.array_equal(first.source, other.source)
    assert (first.window == other.window).sum() < 10


def test_shape_and_types_of_rows() -> None:
    rows = StageStream(*big_stage()).rows(0, 20_000)
    assert (rows.source.dtype, rows.epoch.dtype, rows.window.dtype) == (np.uint16, np.int64, np.int64)
    assert len(rows) == 20_000
    assert rows.counts() == {"code": 2998, "math": 2, "web": 17_000}
    assert rows.names == ("code", "math", "web")


def test_a_source_of_weight_zero_is_not_needed() -> None:
    stage, orders = big_stage()
    stage.weights = {"web": Fraction(1), "gone": Fraction(0)}
    assert StageStream(stage, orders).rows(0, 10).counts() == {"web": 10}


def test_a_cursor_of_another_length_is_refused() -> None:
    stage, orders = big_stage()
    stage.cursors["code"] = Cursor(4096, 5)
    with pytest.raises(ValueError, match="stage 'stable' reads windows of 2048, but its cursor of 'code'"):
        StageStream(stage, orders)
