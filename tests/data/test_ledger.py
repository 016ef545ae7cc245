"""The ledger law: tokens per source add up, a branch inherits its parent, and a run is held to the plan."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_smol.data.ledger import Ledger, planned_ledger
from megatron_smol.data.order import Cursor, SourceOrder
from megatron_smol.data.stream import StageStream
from megatron_smol.errors import CheckpointError, UserError

from .plans import Plan, Stage, plans


def consume(ledger: Ledger, plan: Plan, stage: Stage, steps: int) -> None:
    """Add the first `steps` global batches of a stage one by one, as a trainer does."""
    stream = StageStream(stage, plan.orders)
    for step in range(steps):
        start = step * stage.global_batch
        ledger.add(stage.name, stage.seq_length, stream.rows(start, start + stage.global_batch))


def run(plan: Plan, leaf: Stage) -> Ledger:
    ledger = Ledger.of(plan)
    for stage, samples in plan.lineage(leaf):
        ledger = ledger.copy()
        consume(ledger, plan, stage, samples // stage.global_batch)
    return ledger


@settings(max_examples=150, deadline=None)
@given(plans())
def test_what_was_consumed_is_what_was_planned_along_every_lineage(plan: Plan) -> None:
    for leaf in plan.stages:
        ledger = run(plan, leaf)
        ledger.check(plan, leaf.name, leaf.samples)
        consumed = sum(samples * stage.seq_length for stage, samples in plan.lineage(leaf))
        assert ledger.consumed_tokens == sum(ledger.tokens().values()) == consumed
        assert ledger == planned_ledger(plan, leaf.name, leaf.samples)


@settings(max_examples=100, deadline=None)
@given(plans(), st.data())
def test_no_epoch_of_a_source_is_read_beyond_its_end(plan: Plan, data: st.DataObject) -> None:
    leaf = data.draw(st.sampled_from(plan.stages))
    read: dict[tuple[str, int], int] = {}
    for use in run(plan, leaf).stages.values():
        for source, by_epoch in use.samples_by_epoch.items():
            for epoch, samples in by_epoch.items():
                read[source, epoch] = read.get((source, epoch), 0) + samples * use.seq_length
    assert all(tokens <= plan.orders[source].tokens_per_epoch for (source, _), tokens in read.items())


@settings(max_examples=100, deadline=None)
@given(plans(), st.data())
def test_json_round_trip(plan: Plan, data: st.DataObject) -> None:
    ledger = run(plan, data.draw(st.sampled_from(plan.stages)))
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger and again.to_json() == ledger.to_json()


@settings(max_examples=100, deadline=None)
@given(plans(), st.data())
def test_any_changed_count_is_noticed(plan: Plan, data: st.DataObject) -> None:
    leaf = data.draw(st.sampled_from(plan.stages))
    ledger = run(plan, leaf)
    assume(ledger.stages)
    use = ledger.stages[data.draw(st.sampled_from(sorted(ledger.stages)))]
    source = data.draw(st.sampled_from(sorted(use.samples_by_epoch)))
    use.add(source, data.draw(st.integers(0, 3)), data.draw(st.sampled_from([-1, 1])))
    with pytest.raises(UserError, match="by the ledger"):
        ledger.check(plan, leaf.name, leaf.samples)


def two_stages() -> Plan:
    plan = Plan({name: SourceOrder(name, 1000 * 16 + 1, 16, 8) for name in ("web", "code", "math")})
    first = plan.add({"web": Fraction(3, 4), "code": Fraction(1, 4)}, 8, 100, 8)
    plan.add({"web": Fraction(1, 2), "math": Fraction(1, 2)}, 16, 10, 4, first)
    return plan


def test_a_branch_leaves_its_parent_as_it_was() -> None:
    plan = two_stages()
    ledger = run(plan, plan.stages[0])
    before = ledger.to_json()
    branch = ledger.copy()
    consume(branch, plan, plan.stages[1], 10)
    assert ledger.to_json() == before
    branch.check(plan, "stage-1", 40)
    assert branch.consumed_tokens == 100 * 8 * 8 + 10 * 4 * 16


def test_the_json_says_what_a_person_asks() -> None:
    plan = two_stages()
    data = run(plan, plan.stages[0]).to_json()
    assert data["consumed_tokens"] == 6400 and data["consumed_samples"] == 800
    assert data["sources"]["web"] == {"tokens": 4800, "tokens_per_epoch": 16000, "epochs": 0.3}
    assert data["unread_sources"] == {"math": 16000}
    assert data["stages"][0]["sources"]["code"] == {
        "samples": 200,
        "tokens": 1600,
        "samples_by_epoch": {"0": 200},
    }


def test_disagreement_is_told_to_the_token() -> None:
    plan = two_stages()
    ledger = run(plan, plan.stages[0])
    with pytest.raises(
        UserError, match="stage 'stage-0' read 1600 tokens of epoch 0 of source 'code' by the ledger, 1616"
    ):
        ledger.check(plan, "stage-0", 808)
    with pytest.raises(UserError, match="holds stages stage-0, the plan stage-0, stage-1"):
        ledger.check(plan, "stage-1", 4)
    plan.stages[0].cursors["web"] = Cursor(8, 1900)  # same counts, but from another place
    with pytest.raises(UserError, match="source 'web'"):
        ledger.check(plan, "stage-0", 800)


def test_rows_of_another_length_are_refused() -> None:
    plan = two_stages()
    ledger = run(plan, plan.stages[0])
    rows = StageStream(plan.stages[0], plan.orders).rows(0, 1)
    with pytest.raises(ValueError, match="length 8 in the ledger, got rows of 16"):
        ledger.add("stage-0", 16, rows)


def test_a_damaged_ledger_is_refused() -> None:
    plan = two_stages()
    data = run(plan, plan.stages[0]).to_json()
    with pytest.raises(CheckpointError, match="add up to 6400 tokens, it says 6401"):
        Ledger.from_json(data | {"consumed_tokens": 6401})
    with pytest.raises(CheckpointError, match="version 7"):
        Ledger.from_json(data | {"version": 7})
    with pytest.raises(CheckpointError, match="damaged"):
        Ledger.from_json({"version": 1})


@settings(max_examples=100, deadline=None)
@given(plans(), st.data())
def test_what_was_skipped_is_read_and_not_trained_on(plan: Plan, data: st.DataObject) -> None:
    """Any steps may be skipped: the ledger is held to the plan as before, and tells the skipped tokens to the last."""
    leaf = data.draw(st.sampled_from(plan.stages))
    ledger, skipped = Ledger.of(plan), 0
    coin = random.Random(data.draw(st.integers(0, 1 << 32)))
    for stage, samples in plan.lineage(leaf):
        stream = StageStream(stage, plan.orders)
        for step in range(samples // stage.global_batch):
            start, applied = step * stage.global_batch, coin.random() < 0.7
            ledger.add(stage.name, stage.seq_length, stream.rows(start, start + stage.global_batch), applied)
            skipped += 0 if applied else stage.global_batch * stage.seq_length
    ledger.check(plan, leaf.name, leaf.samples)
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger
    written = ledger.to_json()
    assert sum(ledger.skipped_tokens().values()) == written["skipped_tokens"] == skipped
    assert written["trained_tokens"] == ledger.consumed_tokens - skipped
    assert written["skipped_tokens"] == sum(
        source.get("skipped_tokens", 0) for source in written["sources"].values()
    )


def test_a_changed_count_of_skipped_tokens_is_noticed_and_an_older_ledger_is_read() -> None:
    plan = two_stages()
    data = run(plan, plan.stages[0]).to_json()
    with pytest.raises(CheckpointError, match="stages skipped 0 tokens, it says 64"):
        Ledger.from_json(data | {"skipped_tokens": 64})
    older = {key: value for key, value in data.items() if key not in ("skipped_tokens", "trained_tokens")}
    assert Ledger.from_json(older).to_json() == data
