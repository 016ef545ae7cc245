"""The weights that are proposed: a mixture, within every cap, for any recipe and any evidence."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.errors import UserError
from megatron_smol.rebalance.propose import Effect, propose
from megatron_smol.rebalance.room import UNITS, Room, rooms, with_mixture
from megatron_smol.recipe.plan import make_plan
from megatron_smol.recipe.schema import Recipe

NAMES = ("a", "b", "c", "d")


def mixture(counts: list[int]) -> dict[str, Any]:
    total = sum(counts)
    return {name: str(Fraction(count, total)) for name, count in zip(NAMES, counts, strict=True) if count}


def recipe(sizes: list[int], caps: list[float | None], mixes: list[list[int]], samples: int) -> Recipe:
    """first -> next -> last, and a branch out of `next`, half of it before its end."""
    steps = max(2, samples // 4)
    stages: list[dict[str, Any]] = [
        {"name": "first", "tokens": "5 steps", "mixture": mixture(mixes[0])},
        {"name": "next", "tokens": f"{steps} steps", "mixture": mixture(mixes[1])},
        {"name": "last", "tokens": "3 steps", "mixture": mixture(mixes[2]), "seq_length": 32},
        {
            "name": "branch",
            "from": {"stage": "next", "before_end": f"{steps // 2} steps"},
            "tokens": "7 steps",
            "mixture": mixture(mixes[3]),
        },
    ]
    sources = {
        name: {"path": "none", "tokens": size, **({} if cap is None else {"max_epochs": cap})}
        for name, size, cap in zip(NAMES, sizes, caps, strict=True)
    }
    return Recipe.model_validate(
        {
            "name": "p", "run_dir": "run", "tokenizer": "none", "sources": sources, "stages": stages,
            "model": {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "ffn_size": 64},
            "data": {"holdout_tokens": 64}, "lr": {"peak": 1e-3},
            "training": {"seq_length": 16, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
        }
    )  # fmt: skip


four = st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any)
effect = st.builds(
    lambda improvement, clear: Effect(improvement, 0.01, clear, ()), st.floats(-1, 1), st.booleans()
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(500, 20_000), min_size=4, max_size=4),
    st.lists(st.none() | st.sampled_from([0.5, 1.0, 2.5, 4.0]), min_size=4, max_size=4),
    st.lists(four, min_size=4, max_size=4),
    st.integers(8, 400),
    st.dictionaries(st.sampled_from(NAMES), effect),
    st.sampled_from([0.02, 0.1, 0.5, 1.0]),
)
def test_any_proposal_is_a_mixture_within_every_cap(
    sizes: list[int],
    caps: list[float | None],
    mixes: list[list[int]],
    samples: int,
    effects: dict[str, Effect],
    step: float,
) -> None:
    plan = make_plan(recipe(sizes, caps, mixes, samples))
    stage = plan.stage("next")
    room = rooms(plan, stage)
    try:
        weights = propose(stage.weights, room, effects, step)
    except UserError as error:
        usable = {*stage.weights, *effects}
        assert sum(room[name].highest for name in usable) < UNITS and "epoch caps leave" in str(error)
        return
    units = {name: weight.proposed for name, weight in weights.items()}
    assert sum(units.values()) == UNITS and min(units.values()) >= 0
    assert set(weights) >= set(stage.weights)
    after = with_mixture(plan, stage, {n: Fraction(u, UNITS) for n, u in units.items() if u})
    ends = [after.epochs(after.stage(name)) for name in ("next", "last", "branch")]
    for name, count in units.items():
        assert count <= room[name].highest
        if count:
            assert max(end[name] for end in ends) <= room[name].cap, "by the plan's own count"
    for name, own in effects.items():
        weight = weights[name]
        if own.clear and own.improvement > 0 and room[name].highest > weight.proposed:
            assert weight.proposed >= weight.planned - 1, "what helped does not lose, unless a cap says so"


def open_rooms(**highest: int) -> dict[str, Room]:
    return {name: Room(0.0, 4.0, True, units) for name, units in highest.items()}


def units_of(
    planned: dict[str, str], rooms: dict[str, Room], step: float = 0.1, **effects: float
) -> dict[str, int]:
    found = {name: Effect(value, 0.01, True, ()) for name, value in effects.items()}
    weights = propose({n: Fraction(w) for n, w in planned.items()}, rooms, found, step)
    return {name: weight.proposed for name, weight in weights.items()}


def test_the_rule_by_hand() -> None:
    """a helped most: +10 points. b helped half as much: +5. d harmed: -10, of its 20. c and e share the rest 3 to 1."""
    rooms_ = open_rooms(a=UNITS, b=UNITS, c=UNITS, d=UNITS, e=UNITS)
    planned = {"a": "0.1", "b": "0.1", "c": "0.45", "d": "0.2", "e": "0.15"}
    found = units_of(planned, rooms_, a=0.2, b=0.1, d=-0.3)
    assert found == {"a": 2000, "b": 1500, "c": 4125, "d": 1000, "e": 1375}


def test_a_cap_stops_a_gain_and_the_untested_take_it() -> None:
    rooms_ = open_rooms(a=1200, b=UNITS, c=UNITS)
    found = units_of({"a": "0.1", "b": "0.6", "c": "0.3"}, rooms_, a=0.2)
    assert found == {"a": 1200, "b": 5867, "c": 2933}


def test_a_source_that_the_plan_does_not_have_yet_comes_in() -> None:
    found = units_of({"b": "1"}, open_rooms(a=UNITS, b=UNITS), a=0.2)
    assert found == {"a": 1000, "b": 9000}


def test_noise_moves_nothing() -> None:
    rooms_ = open_rooms(a=UNITS, b=UNITS)
    unclear = {"a": Effect(0.5, 0.4, False, ())}
    weights = propose({"a": Fraction("0.3"), "b": Fraction("0.7")}, rooms_, unclear, 0.1)
    assert {name: (own.proposed, own.basis) for name, own in weights.items()} == {
        "a": (3000, "guess"), "b": (7000, "guess"),
    }  # fmt: skip


def test_caps_that_leave_no_mixture_are_said() -> None:
    with pytest.raises(UserError, match=r"leave 70.00% of the stage's tokens \(a 20.00%, b 50.00%\)"):
        units_of({"a": "0.5", "b": "0.5"}, open_rooms(a=2000, b=5000))
