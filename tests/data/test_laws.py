"""The laws of the data, on random recipes as a user could write them, against the oracle in plain Python.

Sources of one window to 1e12 tokens, 1 to 12 stages, lengths that go up and down, branches, weights as small as
0.0002 and a single source of weight 1. LAWS_EXAMPLES=2000 in the environment asks for so many recipes.
"""

from __future__ import annotations

import os
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_smol.data.ledger import Ledger, planned_ledger
from megatron_smol.data.stream import Rows, open_stream
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.plan import Plan, StagePlan, make_plan

from . import oracle

EXAMPLES = int(os.environ.get("LAWS_EXAMPLES", "100"))
ENUMERATED = 4000  # samples of a lineage that are all looked at; of longer ones, probes

laws = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@st.composite
def mixtures(draw: st.DrawFn, names: list[str]) -> dict[str, str]:
    """Decimals that sum to 1: of one source, or of several in tenths, hundredths or 0.0002ths."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names), unique=True))
    if len(chosen) == 1:
        return {chosen[0]: "1"}
    whole = draw(st.sampled_from([10, 100, 5000]))
    kind = draw(st.sampled_from(["even", "one giant"]))
    if kind == "one giant":
        parts = [1] * (len(chosen) - 1)
    else:
        most = whole // len(chosen)
        parts = [draw(st.integers(1, most)) for _ in chosen[1:]]
    parts.append(whole - sum(parts))
    return {name: str(part / whole) for name, part in zip(chosen, parts, strict=True)}


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe. Small runs can be looked at row by row; in large ones everything is large."""
    large = draw(st.booleans())
    lengths = draw(st.sampled_from([[16], [4, 8, 16], [32, 64], [2048, 8192]]))
    page_length = max(lengths)
    windows = (
        st.integers(10**5, 10**12 // page_length)
        if large
        else st.one_of(st.integers(1, 8), st.integers(64, 700), st.integers(10**4, 10**12 // page_length))
    )
    names = [f"s{i}" for i in range(draw(st.integers(1, 6)))]
    sources = {
        name: {
            "path": name,
            "tokens": str(draw(windows) * page_length + 1 + draw(st.integers(0, page_length - 1))),
        }
        for name in names
    }
    stages: list[dict[str, Any]] = []
    steps_of: dict[str, int] = {}
    for number in range(draw(st.integers(1, 12))):
        stage: dict[str, Any] = {"name": f"t{number}", "mixture": draw(mixtures(names))}
        # The longest length must occur, since it is the page length that the sources were made for.
        stage["seq_length"] = draw(st.sampled_from(lengths)) if number else page_length
        stage["global_batch"] = draw(st.sampled_from([1, 3, 8] if not large else [1, 480, 1024]))
        steps = draw(st.integers(1, 10**6 if large else 40))
        per_step = stage["seq_length"] * stage["global_batch"]
        off = draw(st.integers(-(per_step // 2), (per_step - 1) // 2)) if steps > 1 else 0
        stage["tokens"] = draw(st.sampled_from([f"{steps} steps", steps * per_step + off]))
        if number and draw(st.booleans()):
            parent = draw(st.sampled_from(stages))
            back = draw(st.integers(0, steps_of[parent["name"]] - 1))
            per_step = parent["seq_length"] * parent["global_batch"]
            tokens = back * per_step + draw(st.integers(-((per_step - 1) // 2) if back else 0, per_step // 2))
            before_end: str | int = draw(st.sampled_from([f"{back} steps", tokens]))
            stage["from"] = {"stage": parent["name"], "before_end": before_end}
        steps_of[stage["name"]] = steps
        stages.append(stage)
    return {
        "name": "random",
        "run_dir": "runs/random",
        "tokenizer": "tok",
        "model": {
            "layers": 1,
            "hidden_size": 8,
            "heads": 1,
            "kv_heads": 1,
            "ffn_size": 8,
            "vocab_size": 64,
        },
        "data": {"seed": draw(st.integers(0, 99)), "over_epochs": "warn"},
        "sources": sources,
        "training": {
            "seq_length": page_length,
            "global_batch": 1,
            "micro_batch": 1,
            "precision": "fp32",
        },
        "stages": stages,
        "lr": {"peak": 1e-3},
    }


def planned(recipe: dict[str, Any]) -> Plan:
    return make_plan(parse_recipe(yaml.safe_dump(recipe, sort_keys=False)))


def listed(rows: Rows) -> list[tuple[str, int, int]]:
    names = [rows.names[index] for index in rows.source.tolist()]
    return [*zip(names, rows.epoch.tolist(), rows.window.tolist(), strict=True)]


def lineage(plan: Plan, stage: StagePlan) -> list[tuple[StagePlan, int]]:
    """(stage, samples of it) from the root to the end of `stage`."""
    path, samples = [(stage, stage.samples)], 0
    while stage.parent is not None:
        parent = plan.stage(stage.parent)
        samples = (stage.start_step - parent.start_step) * parent.global_batch
        path.append((parent, samples))
        stage = parent
    return path[::-1]


@laws
@given(recipes(), st.data())
def test_the_oracle_agrees_with_plan_order_and_ledger(recipe: dict[str, Any], data: st.DataObject) -> None:
    """Boundaries of stages, skips, rows at any place, and tokens by source."""
    plan = planned(recipe)
    for stage, plain in zip(plan.stages, oracle.walk(recipe), strict=True):
        assert (stage.parent, stage.start_step, stage.steps) == (plain.parent, plain.start_step, plain.steps)
        assert (stage.start_tokens, stage.skipped_tokens) == (plain.start_tokens, plain.skipped)
        stream, first = open_stream(stage, plan.orders), data.draw(st.integers(0, stage.samples - 1))
        for start in {0, first, stage.samples - 1}:
            stop = min(start + 3, stage.samples)
            assert listed(stream.rows(start, stop)) == [plain.row(i) for i in range(start, stop)]
        for samples in (first, stage.samples):
            _, read = plain.after(samples)
            assert planned_ledger(plan, stage.name, samples).tokens() == +read
        assert {name: stage.tokens_after(name) for name in read if read[name]} == +read


@laws
@given(recipes(), st.data())
def test_order_does_not_depend_on_how_it_is_read(recipe: dict[str, Any], data: st.DataObject) -> None:
    """Ranks, micro-batches and restarts only cut the samples in other places."""
    plan = planned(recipe)
    again = planned(recipe | {"seed": 7, "sources": dict(reversed(recipe["sources"].items()))})
    for stage, other in zip(plan.stages, again.stages, strict=True):
        start = data.draw(st.integers(0, stage.samples - 1))
        stop = min(start + data.draw(st.integers(1, 64)), stage.samples)
        whole = listed(open_stream(stage, plan.orders).rows(start, stop))
        cut = data.draw(st.integers(start, stop))
        stream = open_stream(other, again.orders)
        assert listed(stream.rows(start, cut)) + listed(stream.rows(cut, stop)) == whole


@laws
@given(recipes(), st.data())
def test_proportion_at_every_prefix(recipe: dict[str, Any], data: st.DataObject) -> None:
    """The law allows 2 samples; the blend keeps within 1."""
    plan = planned(recipe)
    for stage in plan.stages:
        stream = open_stream(stage, plan.orders)
        first = data.draw(st.integers(0, max(0, stage.samples - 300)))
        begin = {name: sum(by_epoch.values()) for name, by_epoch in stream.use(first).items()}
        rows = stream.rows(first, min(first + 300, stage.samples))
        samples = first + np.arange(1, len(rows) + 1)
        for index, name in enumerate(rows.names):
            count = begin.get(name, 0) + np.cumsum(rows.source == index)
            weight = Fraction(recipe["stages"][stage.index]["mixture"][name])
            away = np.abs(count * weight.denominator - samples * weight.numerator).max()
            assert away < weight.denominator


@laws
@given(recipes())
def test_coverage_along_every_lineage(recipe: dict[str, Any]) -> None:
    """Within an epoch no token is read twice, and none is left out but what the plan says it skips."""
    plan = planned(recipe)
    for leaf in plan.stages:
        path = lineage(plan, leaf)
        if sum(samples for _, samples in path) > ENUMERATED:
            continue
        seen: dict[tuple[str, int], list[tuple[int, int]]] = {}
        skipped: Counter[str] = Counter()
        for stage, samples in path:
            skipped.update(stage.skipped_tokens)
            for name, epoch, window in listed(open_stream(stage, plan.orders).rows(0, samples)):
                first = window * stage.seq_length
                seen.setdefault((name, epoch), []).append((first, first + stage.seq_length))
        for (name, _), stretches in seen.items():
            stretches.sort()
            assert all(a[1] <= b[0] for a, b in pairwise(stretches))
            assert stretches[0][0] >= 0 and stretches[-1][1] <= plan.orders[name].tokens_per_epoch
        for name in plan.orders:
            cursor = leaf.cursors[name]
            passed = (cursor.position + leaf.draws.get(name, 0)) * cursor.seq_length
            read = sum(
                b - a for (source, _), stretches in seen.items() if source == name for a, b in stretches
            )
            assert passed == read + skipped[name]


@laws
@given(recipes(), st.data())
def test_no_window_of_an_epoch_is_read_at_two_positions(recipe: dict[str, Any], data: st.DataObject) -> None:
    """Coverage where a run is too long to look at all of it: every window has one position, and leads back to it."""
    plan = planned(recipe)
    for stage in plan.stages:
        for name in stage.weights:
            order, length = plan.orders[name], stage.seq_length
            per_epoch = order.windows_per_epoch(length)
            epochs = np.array(data.draw(st.lists(st.integers(0, 2**20), min_size=1, max_size=3)))
            windows = np.array([data.draw(st.integers(0, per_epoch - 1)) for _ in epochs])
            positions = order.locate(length, epochs, windows)
            assert (positions // per_epoch == epochs).all()
            epoch, window = order.lookup(length, positions)
            assert (epoch == epochs).all() and (window == windows).all()
            assert (order.locate(length, *order.lookup(length, positions + 1)) == positions + 1).all()


@laws
@given(recipes(), st.data())
def test_ledger_adds_up_and_branches_inherit(recipe: dict[str, Any], data: st.DataObject) -> None:
    plan = planned(recipe)
    for leaf in plan.stages:
        path = lineage(plan, leaf)
        whole = planned_ledger(plan, leaf.name, leaf.samples)
        assert whole.consumed_tokens == sum(whole.tokens().values()) == leaf.end_tokens
        assert sum(whole.tokens().values()) == sum(n * stage.seq_length for stage, n in path)
        if leaf.parent is not None:  # what a branch starts from is what its parent had read
            parent, samples = path[-2]
            inherited = planned_ledger(plan, parent.name, samples)
            assert planned_ledger(plan, leaf.name, 0) == inherited
            assert whole.consumed_tokens - inherited.consumed_tokens == leaf.tokens
        if sum(samples for _, samples in path) > ENUMERATED:
            continue
        counted = Ledger.of(plan)
        for stage, samples in path:  # as a trainer counts, batch by batch
            counted = counted.copy()
            stream = open_stream(stage, plan.orders)
            for start in range(0, samples, stage.global_batch):
                counted.add(stage.name, stage.seq_length, stream.rows(start, start + stage.global_batch))
        counted.check(plan, leaf.name, leaf.samples)
        assert counted == whole
