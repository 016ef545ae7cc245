"""A mixture is changed in a recipe's text however it was written, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_smol.errors import UserError
from megatron_smol.rebalance.diff import append_stage, flow_mixture, replace_mixture, unified
from megatron_smol.recipe.load import RecipeLoader, load_recipe, parse_recipe

DEMO = Path(__file__).parents[2] / "examples/demo.yaml"
UNITS = {"a": 2500, "b": 0, "c": 7500}
WANTED = {"a": 0.25, "c": 0.75}
SHAPES = {
    "flow": "  - name: x # one\n    mixture: {a: 1, b: 0}   # why\n    tokens: 5\n",
    "anchor": "  - name: x\n    mixture: &m {a: 1}\n  - {name: z, mixture: {w: {weight: 1, of: *m}}}\n",
    "alias": "  - {name: y, mixture: &m {b: 1}}\n  - name: x\n    mixture: *m  # the same\n    tokens: 5\n",
    "block": "  - name: x\n    mixture:\n      a: 0.5\n      g: {weight: 0.5, of: {b: 1}}\n    # then\n    tokens: 5\n",
    "nested": "  - name: x\n    mixture:\n      a: 0.5\n      g:\n        weight: 0.5\n        of:\n          b: 1\n    tokens: 5\n",
    "last": "  - mixture:\n      a: 1\n    name: x",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_to_write_a_mixture(shape: str) -> None:
    before = f"# a recipe\nstages:\n{SHAPES[shape]}"
    after = replace_mixture(before, "x", UNITS)
    old, new = (yaml.load(text, RecipeLoader)["stages"] for text in (before, after))
    for was, now in zip(old, new, strict=True):
        assert now["name"] == was["name"] and now.get("tokens") == was.get("tokens")
        if now["name"] == "x":
            assert now["mixture"] == WANTED
        elif shape != "anchor":
            assert now == was
    if shape == "anchor":
        assert new[1]["mixture"]["w"]["of"] == WANTED, "who shares it changes with it; the report says so"
    comments = [line.partition("#")[2] for line in before.splitlines() if "#" in line]
    assert all(comment in after for comment in comments)


def test_a_mixture_that_comes_from_elsewhere_is_left_alone() -> None:
    text = "base: &b {mixture: {a: 1}}\nstages:\n  - {<<: *b, name: x}\n"
    with pytest.raises(UserError, match="takes 'mixture' from elsewhere"):
        replace_mixture(text, "x", UNITS)


def test_a_stage_is_added_behind_the_trunk() -> None:
    text = DEMO.read_text()
    after = append_stage(text, "more", "30_000", {"docs": 0.5, "code": "1/2"}, "demo.yaml")
    recipe = parse_recipe(after)
    assert [stage.name for stage in recipe.stages].index("more") == 4, (
        "before the branches that follow the decay"
    )
    assert recipe.stages[4].mixture == {"docs": 0.5, "code": 0.5} and recipe.stages[4].tokens.value == 30_000  # type: ignore[union-attr]
    assert [line for line in after.splitlines() if line not in text.splitlines()] == [
        "  - name: more", "    tokens: 30_000", "    mixture: {docs: 0.5, code: 1/2}",
    ]  # fmt: skip
    with pytest.raises(UserError, match="on one line"):
        append_stage("stages: [{name: a, mixture: {a: 1}}]", "b", "5", {"a": 1}, "x.yaml")


def test_the_demo_decay_is_changed_where_it_stands() -> None:
    units = {"docs": 5000, "code": 3000, "math": 1500, "textbook": 500}
    after = replace_mixture(DEMO.read_text(), "decay", units)
    lines = unified(DEMO.read_text(), after, "demo.yaml").splitlines()
    assert [line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))] == [
        "-    mixture: &decay {docs: 0.58, code: 0.24, math: 0.14, textbook: 0.04}",
        f"+    mixture: &decay {flow_mixture(units)}",
    ]
    assert parse_recipe(after).sources == load_recipe(DEMO).sources
