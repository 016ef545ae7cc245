"""The plan: SmolLM2's published figures, the rules at boundaries, caps, invariants of any tree of stages."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data.blend import Blend
from megatron_smol.data.order import Cursor
from megatron_smol.errors import UserError
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import Plan, make_plan, resolve_sizes
from tests.recipe.recipes import EXAMPLES, SHIPPED, load, small


def shipped(name: str) -> Plan:
    return make_plan(load_recipe(EXAMPLES / f"{name}.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_plans_without_error(name: str) -> None:
    plan = shipped(name)
    plan.require_no_errors()
    assert not [problem for problem in plan.problems if "owm" not in problem.message]


@pytest.mark.parametrize(
    ("name", "parameters", "steps", "tokens", "decay_from"),
    [
        ("smollm2_135m", 134_515_008, 2_000_000, 2_097_152_000_000, 1_677_721_600_000),
        ("smollm2_360m", 361_821_120, 2_600_000, 4_089_446_400_000, 3_271_557_120_000),
        ("smollm2_1.7b", 1_711_376_384, 5_240_000, 10_989_076_480_000, 9_890_168_832_000),
    ],
)
def test_published_totals(name: str, parameters: int, steps: int, tokens: int, decay_from: int) -> None:
    plan = shipped(name)
    assert plan.recipe.model.parameters() == parameters
    assert plan.recipe.model.head_dim == 64
    assert (plan.trunk[-1].end_step, plan.trunk[-1].end_tokens) == (steps, tokens)
    schedule = plan.schedules[0]
    assert schedule(decay_from) == plan.recipe.lr.peak > schedule(decay_from + 10**9)


def test_1_7b_boundaries() -> None:
    plan = shipped("smollm2_1.7b")
    ends = [stage.end_step for stage in plan.stages]
    assert ends == [2_861_023, 3_814_697, 4_768_372, 5_240_000, 5_240_000]
    for stage, target in zip(plan.stages, (6e12, 8e12, 10e12), strict=False):
        assert abs(stage.end_tokens - target) <= stage.tokens_per_step / 2
    assert plan.stages[0].tokens_per_step == 2_097_152


def test_1_7b_extension_is_35_763_steps_and_goes_on_with_the_same_schedule() -> None:
    plan = shipped("smollm2_1.7b")
    decay, long = plan.stage("decay"), plan.stage("long-context")
    assert (long.parent, long.steps, long.seq_length, long.rope_base) == ("decay", 35_763, 8192, 130_000)
    assert long.start_step == 5_240_000 - 35_763
    assert long.tokens_per_step == decay.tokens_per_step
    assert plan.lr(long.index, long.start_step) == plan.lr(decay.index, long.start_step) > 0
    assert plan.lr(long.index, long.end_step) == 0
    assert plan.save_points() == {("decay", 5_204_237)}


def test_1_7b_learning_rate() -> None:
    plan = shipped("smollm2_1.7b")
    assert [plan.lr(0, step) for step in (0, 1000, 2000, 2001)] == [0, 2.5e-4, 5e-4, 5e-4]
    assert plan.lr(2, 4_716_000) == 5e-4 > plan.lr(2, 4_716_001)
    assert plan.lr(3, 4_978_000) == pytest.approx(2.5e-4, rel=1e-12)
    assert plan.lr(3, 5_240_000) == 0


def test_1_7b_reading_matches_the_paper() -> None:
    """Tokens drawn over the trunk and epochs, from the paper's shares and sizes."""
    plan = shipped("smollm2_1.7b")
    decay = plan.stage("decay")
    drawn = {name: decay.tokens_after(name) for name in plan.sizes}
    epochs = plan.epochs(decay)
    assert drawn["fineweb_edu"] == pytest.approx(4.96e12, rel=0.002)
    assert drawn["dclm"] == pytest.approx(4.0e12, rel=0.005)
    assert drawn["starcoderdata"] == pytest.approx(1.0e12, rel=0.001)
    code = sum(drawn[name] for name in ("stack_edu", "starcoder2_extra", "starcoder2_jupyter"))
    assert code == pytest.approx(0.557e12, rel=0.005)
    assert drawn["infimm_webmath"] + drawn["owm"] == pytest.approx(300e9, rel=0.005)
    assert epochs["fineweb_edu"] == pytest.approx(3.8, abs=0.05)
    assert epochs["dclm"] == pytest.approx(1.05, abs=0.01)
    assert epochs["starcoderdata"] == pytest.approx(4.0, abs=0.01)
    assert epochs["cosmopedia_v2"] == pytest.approx(1.32, abs=0.01)
    assert plan.epochs(plan.stage("stable-2"))["owm"] == pytest.approx(8.33, abs=0.01)
    assert plan.stages[0].weights == {
        "fineweb_edu": Fraction(54, 100),
        "dclm": Fraction(36, 100),
        "starcoderdata": Fraction(1, 10),
    }


def test_1_7b_flags_owm_and_nothing_else() -> None:
    [problem] = shipped("smollm2_1.7b").problems
    assert problem.level == "warning"
    assert problem.message.startswith(
        "source 'owm' (12B tokens) is read 8.33 times by the end of 'stable-2', above its max_epochs of 5"
    )


def test_demo_has_five_switches() -> None:
    plan = shipped("demo")
    assert [stage.name for stage in plan.stages] == [
        "stable-1",
        "stable-2",
        "stable-3",
        "decay",
        "anneal-math",
        "long-context",
    ]
    assert sum(stage.tokens for stage in plan.stages) < 350_000, "more would not be a demo"
    assert {stage.seq_length for stage in plan.stages} == {256, 1024}
    assert all(order.tokens == plan.sizes[name] - 32768 for name, order in plan.orders.items())


def test_rounds_to_the_nearest_step_halves_upwards() -> None:
    def end(until: int) -> int:
        return make_plan(load(small(**{"stages.0.until": until}))).stages[0].end_step

    assert [end(512 * 10 + extra) for extra in (0, 255, 256, 257)] == [10, 10, 11, 11]


def test_branch_point_is_the_nearest_parent_step() -> None:
    def start(before_end: int) -> int:
        recipe = load(small(**{"stages.2.from.before_end": before_end}))
        return make_plan(recipe).stages[2].start_step

    assert [start(512 * 10 + extra) for extra in (0, 255, 257)] == [140, 140, 139]
    assert start(0) == 150


def test_a_stage_after_a_branch_continues_the_trunk() -> None:
    data = small()
    data["stages"].append({"name": "after", "tokens": "5 steps", "mixture": {"web": 1}})
    data["stages"].append(
        {
            "name": "twig",
            "from": {"stage": "long", "before_end": "4 steps"},
            "tokens": "1 step",
            "mixture": {"web": 1},
        }
    )
    plan = make_plan(load(data))
    assert (plan.stages[3].parent, plan.stages[3].start_step, plan.stages[3].is_branch) == (
        "decay",
        150,
        False,
    )
    assert (plan.stages[4].parent, plan.stages[4].start_step, plan.stages[4].is_branch) == ("long", 146, True)
    assert [stage.name for stage in plan.trunk] == ["stable", "decay", "after"]


def test_stages_own_rate_starts_where_the_parent_stands() -> None:
    own: dict[str, Any] = {"stages.2.lr": {"end": 1e-5, "shape": "cosine"}}
    plan = make_plan(load(small(**own)))
    assert plan.lr(2, 140) == plan.lr(1, 140) < 1e-3
    assert plan.lr(2, 150) == 1e-5
    own["stages.2.lr"]["start"] = 5e-4
    assert make_plan(load(small(**own))).lr(2, 140) == 5e-4


def test_rate_follows_tokens_through_a_batch_ramp() -> None:
    """Twice the batch from step 100 on: the decay given in steps ends at the same tokens as the trunk."""
    plan = make_plan(load(small(**{"stages.1.global_batch": 16})))
    decay = plan.stages[1]
    assert plan.lr(1, 120) == 1e-3 > plan.lr(1, 121)
    assert decay.end_tokens == 100 * 512 + 50 * 1024
    assert plan.lr(1, 135) == pytest.approx(5e-4)
    assert plan.lr(1, 150) == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"stages.1.until": "50 steps"},
        "stages.decay.until is 50 steps, but the stage starts at 51,200 tokens (step 100): it would end "
        "before it starts",
    ),
    (
        {"stages.1.until": "50k"},
        "stages.decay.until is 50000, but the stage starts at 51,200 tokens (step 100)",
    ),
    ({"stages.1.until": "51300"}, "no step of 512 tokens fits"),
    ({"stages.0.until": "0 steps"}, "no step of 512 tokens fits"),
    (
        {"stages.2.from.before_end": "51 steps"},
        "stages.long.from.before_end is 51 steps, but stage 'decay' is only 25,600 tokens (50 steps) long",
    ),
    ({"stages.2.from.before_end": "1M"}, "stages.long.from.before_end is 1M, but stage 'decay' is only"),
    (
        {"lr.warmup": "130 steps"},
        "lr.decay_start is 120 steps (61,440 tokens), before the warm-up ends at 130 steps",
    ),
    (
        {"lr.decay_start": "1M"},
        "lr.decay_start is 1M (1M tokens), not before the end of the trunk (76,800 tokens)",
    ),
    ({"lr.decay_end": "60k"}, "lr.decay_start is 120 steps (61,440 tokens), not before lr.decay_end, 60000"),
    ({"sources.web.tokens": None}, "sources.web declares no 'tokens'; add its size"),
    ({"sources.web.tokens": 100}, "source 'web' has 100 tokens; after 0 held-out tokens"),
    ({"data.holdout_tokens": "1M"}, "source 'web' has 1,000,000 tokens; after 1,000,000 held-out tokens"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence[:60] for _, sentence in REFUSED])
def test_refuses_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    recipe = load(small(**changes))
    with pytest.raises(UserError) as caught:
        make_plan(recipe)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_caps() -> None:
    tight = {"sources.web.tokens": "10k"}
    [problem] = make_plan(load(small(**tight))).problems
    assert problem.level == "warning" and "set its max_epochs" in problem.message
    capped = make_plan(load(small(**tight, **{"sources.web.max_epochs": 4})))
    assert [problem.level for problem in capped.problems] == ["error"]
    with pytest.raises(
        UserError, match=r"above its max_epochs of 4, .*raise the cap, or set data\.over_epochs: warn"
    ):
        capped.require_no_errors()
    warned = make_plan(load(small(**tight, **{"sources.web.max_epochs": 4, "data.over_epochs": "warn"})))
    assert [problem.level for problem in warned.problems] == ["warning"]
    warned.require_no_errors()
    assert not make_plan(load(small(**tight, **{"sources.web.max_epochs": 10}))).problems


def test_other_warnings() -> None:
    def messages(changes: dict[str, Any]) -> list[str]:
        return [problem.message for problem in make_plan(load(small(**changes))).problems]

    assert messages({"lr.decay_end": "140 steps"}) == [
        "stage 'decay' trains 10 steps after the LR has reached 0; give it an 'lr' of its own",
        "stage 'long' trains 10 steps after the LR has reached 0; give it an 'lr' of its own",
    ]
    assert messages({"lr.decay_end": "180 steps"}) == [
        "the trunk ends before lr.decay_end, at an LR of 0.0005"
    ]
    assert messages({"sources.spare": {"path": "s", "tokens": "1M"}}) == [
        "source 'spare' is in no stage's mixture"
    ]


def test_sizes_come_from_disk_where_the_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_smol.recipe.plan as module

    recipe = load(small())
    monkeypatch.setattr(module, "tokens_on_disk", {"w": 5_000, "c": None, "m": None}.get)
    assert resolve_sizes(recipe) == {"web": 5_000, "code": 10**6, "math": 10**6}
    assert make_plan(recipe, resolve_sizes(recipe)).orders["web"].tokens == 5_000
    recipe = load(small(**{"sources.code.tokens": None}))
    with pytest.raises(
        UserError, match=r"sources\.code has no data at 'c' and no 'tokens'; make the data with"
    ):
        resolve_sizes(recipe)


def test_saves() -> None:
    plan = make_plan(load(small(save={"every": "60 steps"})))
    due = {
        stage.name: [s for s in range(stage.start_step + 1, stage.end_step + 1) if plan.saves(stage.index, s)]
        for stage in plan.stages
    }
    assert due == {"stable": [60, 100], "decay": [120, 140, 150], "long": [150]}
    assert plan.keeps(1, 140) and plan.keeps(0, 100) and not plan.keeps(1, 120)


def test_keep_every_keeps_the_first_interval_checkpoint_after_so_many_tokens() -> None:
    # 512 tokens a step, an interval checkpoint every 4096: 10,000 tokens are passed at steps 24, 40, 64, ...
    plan = make_plan(load(small(**{"save.every": "8 steps", "save.keep_every": 10_000})))
    always = {("stable", 100), ("decay", 140), ("decay", 150), ("long", 150)}
    spaced = {("stable", 24), ("stable", 40), ("stable", 64), ("stable", 80)}
    spaced |= {("decay", 120), ("decay", 144)}
    assert plan.kept() == always | spaced
    for stage in plan.stages:
        steps = range(stage.start_step + 1, stage.end_step + 1)
        kept = {(stage.name, step) for step in steps if plan.keeps(stage.index, step)}
        assert kept == {one for one in plan.kept() if one[0] == stage.name}
    assert make_plan(load(small())).kept() == always


WEIGHTS = st.sampled_from(
    [{"web": 1}, {"web": 0.9, "code": 0.1}, {"web": 0.333, "code": 0.333, "math": 0.334}, {"math": 1}]
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Recipes with up to six stages, on the trunk and on branches of branches, changing length and batch."""
    stages: list[dict[str, Any]] = []
    steps: dict[str, int] = {}
    for index in range(draw(st.integers(1, 6))):
        name = f"s{index}"
        steps[name] = draw(st.integers(1, 40))
        stage: dict[str, Any] = {"name": name, "tokens": f"{steps[name]} steps", "mixture": draw(WEIGHTS)}
        stage["seq_length"] = draw(st.sampled_from([16, 64, 256]))
        stage["global_batch"] = draw(st.sampled_from([2, 8, 12]))
        if index and draw(st.booleans()):
            parent = draw(st.sampled_from([other["name"] for other in stages]))
            stage["from"] = {
                "stage": parent,
                "before_end": f"{draw(st.integers(0, steps[parent] - 1))} steps",
            }
        stages.append(stage)
    return small(stages=stages, lr={"peak": 1.0, "warmup": "0 steps"})


@settings(max_examples=150, deadline=None)
@given(trees())
def test_invariants(data: dict[str, Any]) -> None:
    plan = make_plan(load(data))
    by_name = {stage.name: stage for stage in plan.stages}
    for stage in plan.stages:
        assert stage.tokens == stage.steps * stage.tokens_per_step > 0
        assert sum(stage.draws.values()) == stage.samples
        assert set(stage.cursors) == set(plan.orders)
        assert set(stage.draws) == set(stage.weights) == set(stage.skipped_tokens)
        assert sum(map(stage.tokens_drawn, plan.orders)) == stage.tokens
        assert sum(map(stage.tokens_after, plan.orders)) == stage.end_tokens
        for name in stage.weights:
            assert abs(stage.draws[name] - stage.weights[name] * stage.samples) < 2
            assert stage.cursors[name].seq_length == stage.seq_length
        if stage.parent is None:
            assert (stage.start_step, stage.start_tokens) == (0, 0)
            continue
        parent = by_name[stage.parent]
        assert parent.start_step < stage.start_step <= parent.end_step
        assert stage.is_branch or stage.start_step == parent.end_step
        assert stage.start_tokens == parent.tokens_at(stage.start_step)
        consumed = Blend(parent.weights).counts((stage.start_step - parent.start_step) * parent.global_batch)
        for name, order in plan.orders.items():
            at_branch = order.advance(parent.cursors[name], consumed.get(name, 0))
            if name in stage.weights:
                assert (stage.cursors[name], stage.skipped_tokens[name]) == order.enter(
                    at_branch, stage.seq_length
                )
            else:
                assert stage.cursors[name] == at_branch
    trunk = plan.trunk
    assert all(before.end_step == after.start_step for before, after in pairwise(trunk))


def test_an_unused_source_keeps_its_cursor() -> None:
    plan = make_plan(load(small()))
    assert plan.stages[0].cursors["math"] == Cursor(256, 0)
    assert plan.stages[1].cursors["code"] == Cursor(64, 80)
    assert plan.stages[2].cursors["code"] == Cursor(64, 80)
