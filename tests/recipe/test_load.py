"""Reading recipes: what is accepted, what is refused and in which words, overrides, and writing back."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.errors import UserError
from megatron_smol.recipe.load import dump_recipe, load_recipe, parse_recipe
from megatron_smol.recipe.units import Amount
from tests.recipe.recipes import EXAMPLES, SHIPPED, load, small


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_dumps_back_equal(name: str) -> None:
    recipe = load_recipe(EXAMPLES / f"{name}.yaml")
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_types() -> None:
    recipe = load(small())
    assert recipe.stages[0].until == Amount(100, "steps")
    assert recipe.stages[0].mixture == {"web": Fraction(9, 10), "code": Fraction(1, 10)}
    assert recipe.stages[2].from_ is not None
    assert recipe.training_of(recipe.stages[2]).seq_length == 256
    assert recipe.training_of(recipe.stages[0]).seq_length == 64
    assert recipe.page_length == 256
    assert recipe.save.every == 2000


def test_text_that_begins_like_a_number_is_text() -> None:
    """Such as the hash in the name of an index file."""
    assert load(small(), "run_dir=6e7abb34e14c").run_dir == "6e7abb34e14c"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "'1e-5'", "0.00001", "+1e-5", "1_0e-6", ".1e-4"])
def test_exponents_without_a_dot_are_numbers(text: str) -> None:
    """YAML 1.1 reads 1e-5 as a string; a learning rate written so must be a number."""
    recipe = parse_recipe(f"{_yaml()}\noptimizer: {{eps: {text}}}")
    assert recipe.optimizer.eps == 1e-5
    assert load(small(), f"optimizer.eps={text}").optimizer.eps == 1e-5


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert load(small(), "tokenizer='1e5'").tokenizer == "1e5"


def test_groups_multiply_out_nest_and_add_up() -> None:
    mixture = {
        "pages": {
            "weight": 0.9,
            "of": {"web": 0.6, "more": {"weight": 0.4, "of": {"code": 0.5, "math": 0.5}}},
        },
        "code": 0.1,
    }
    recipe = load(small(**{"stages.0.mixture": mixture}))
    assert recipe.stages[0].mixture == {
        "web": Fraction(27, 50),
        "code": Fraction(7, 25),
        "math": Fraction(9, 50),
    }


def test_weights_may_miss_one_by_rounding_and_sum_to_exactly_one() -> None:
    mixture = {"web": 0.333333, "code": 0.333333, "math": 0.333334}
    assert sum(load(small(**{"stages.0.mixture": mixture})).stages[0].mixture.values()) == 1
    mixture["math"] = 0.333333
    assert sum(load(small(**{"stages.0.mixture": mixture})).stages[0].mixture.values()) == 1


def test_weight_zero_leaves_a_source_out() -> None:
    recipe = load(small(**{"stages.0.mixture": {"web": 1.0, "code": 0}}))
    assert recipe.stages[0].mixture == {"web": Fraction(1)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {[a]: 1}", "recipe line 1, column 9 is not valid YAML: a key must be a plain value"),
        (
            "model:\n  ? {a: 1}\n  : 1",
            "recipe line 2, column 5 is not valid YAML: a key must be a plain value",
        ),
        ("a: &a [*a]", "recipe is not valid YAML: an alias holds itself"),
        ("a: &a {b: *a}", "recipe is not valid YAML: an alias holds itself"),
    ],
)
def test_yaml_that_no_recipe_can_be(text: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(text)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.micro_batch=-1"], "override 'training.micro_batch=-1': training.micro_batch is -1; "),
        (["stages.decay.lr={end: x}"], "override 'stages.decay.lr={end: x}': stages.decay.lr.end is 'x'"),
        (["seed=-1", "lr.peak=2", "seed=-2"], "override 'seed=-2': seed is -2"),
        (["model.layers=4"], "recipe line 1: seed is -3"),
    ],
)
def test_what_an_override_did_is_not_blamed_on_the_file(overrides: list[str], says: str) -> None:
    text = ("seed: -3\n" if "line 1" in says else "") + _yaml()
    with pytest.raises(UserError) as refused:
        parse_recipe(text, "recipe", overrides)
    assert str(refused.value).startswith(says)


REFUSED: list[tuple[dict[str, Any], str]] = [
    # unknown and missing keys
    (
        {"stages.1.mixture": None, "stages.1.mixtur": {"web": 1}},
        "stages.decay: 'mixtur' is not a field; did you mean 'mixture'?",
    ),
    ({"modle": {}}, "'modle' is not a field; did you mean 'model'?"),
    ({"model.hiden_size": 3}, "model: 'hiden_size' is not a field; did you mean 'hidden_size'?"),
    ({"sources.web.max_epoch": 3}, "sources.web: 'max_epoch' is not a field; did you mean 'max_epochs'?"),
    (
        {"stages.2.from.befor_end": 1},
        "stages.long.from: 'befor_end' is not a field; did you mean 'before_end'?",
    ),
    ({"lr.peak": None}, "lr lacks the field 'peak'"),
    ({"name": None}, "the recipe lacks the field 'name'"),
    # wrong types and values
    ({"model.layers": "many"}, "model.layers is 'many'; it should be a valid integer"),
    ({"model.layers": 0}, "model.layers is 0; it should be greater than 0"),
    ({"model.layers": 4.0}, "model.layers is 4.0; it should be a valid integer"),
    ({"model.tied_embeddings": 1}, "model.tied_embeddings is 1; it should be a valid boolean"),
    ({"lr.peak": "fast"}, "lr.peak is 'fast'; it should be a valid number"),
    ({"seed": True}, "seed is True; it should be a valid integer"),
    ({"optimizer": 3}, "optimizer is 3; it should be a section of fields"),
    (
        {"training.precision": "fp16"},
        "training.precision is 'fp16'; it should be 'fp32', 'bf16', 'fp8-tensorwise'",
    ),
    ({"lr.shape": "liner"}, "lr.shape is 'liner'; it should be 'linear', 'cosine' or '1-sqrt'"),
    ({"stages.0.until": "soon"}, "stages.stable.until: 'soon' is not an amount; write tokens as 6T"),
    (
        {"sources.web.tokens": "5 steps"},
        "sources.web.tokens: '5 steps' is in steps, and only tokens are allowed",
    ),
    ({"save": {"every": "1B"}}, "save.every: '1B' is in tokens, and only steps are allowed here"),
    ({"stages.0.name": "a.b"}, "stages.a.b.name is 'a.b'; a name is made of letters, digits, '-' and '_'"),
    ({"stages": []}, "stages is []; "),
    # mixtures
    (
        {"stages.1.mixture": {"web": 0.8, "math": 0.3}},
        "stages.decay.mixture: the weights sum to 1.1, not 1 (web 0.8 + math 0.3)",
    ),
    (
        {"stages.1.mixture": {"g": {"weight": 1, "of": {"web": 0.5, "math": 0.4}}}},
        "stages.decay.mixture: the weights of group 'g' sum to 0.9, not 1 (web 0.5 + math 0.4)",
    ),
    (
        {"stages.1.mixture": {"web": -0.5, "math": 1}},
        "the weight of 'web' is -0.5; a weight is a number from 0 to 1",
    ),
    (
        {"stages.1.mixture": {"web": "half"}},
        "the weight of 'web' is 'half'; a weight is a number from 0 to 1",
    ),
    (
        {"stages.1.mixture": {"g": {"weight": 1}}},
        "group 'g' must look like {weight: 0.9, of: {a: 0.6, b: 0.4}}",
    ),
    ({"stages.1.mixture": {}}, "a mixture must name at least one source"),
    ({"stages.1.mixture": {"web": 0}}, "the weights sum to 0, not 1"),
    (
        {"stages.1.mixture": {"wed": 1}},
        "stages.decay.mixture names 'wed', which is not under 'sources'; did you mean 'web'?",
    ),
    # the tree of stages
    ({"stages.1.name": "stable"}, "stages[1].name is 'stable', and so is an earlier stage's"),
    ({"stages.1.until": None}, "stages.decay has neither 'until' nor 'tokens'"),
    ({"stages.1.tokens": "1M"}, "stages.decay has both 'until' and 'tokens'"),
    ({"stages.2.from.stage": "decai"}, "from.stage is 'decai', which does not exist; did you mean 'decay'?"),
    (
        {"stages.1.from": {"stage": "long"}},
        "stages.decay.from.stage is 'long', which does not come before it",
    ),
    ({"stages.2.from.stage": "long"}, "stages.long.from.stage is 'long', which does not come before it"),
    # the model and its layout
    ({"model.heads": 7}, "model.hidden_size is 96, which is not divisible by model.heads (7)"),
    (
        {"model.kv_heads": 5},
        "model.kv_heads is 5, which does not divide model.heads (12); allowed: 1, 2, 3, 4, 6, 12",
    ),
    (
        {"parallel.tp": 5},
        "parallel.tp is 5, which does not divide model.heads (12); tp allowed for this model: 1, 2, 3, 6",
    ),
    (
        {"parallel.tp": 4},
        "parallel.tp is 4, which does not divide model.kv_heads (6); tp allowed for this model: 1,",
    ),
    ({"parallel.tp": 2, "model.ffn_size": 385}, "does not divide model.ffn_size (385)"),
    ({"parallel.tp": 2, "model.vocab_size": 769}, "does not divide model.vocab_size (769)"),
    (
        {"parallel.pp": 3},
        "parallel.pp is 3, which does not divide model.layers (4); pp allowed for this model: 1, 2, 4",
    ),
    ({"parallel.sequence_parallel": True}, "parallel.sequence_parallel is true, but parallel.tp is 1"),
    (
        {"parallel.gpus": 3, "parallel.tp": 2},
        "parallel.gpus is 3, which is not divisible by tp * pp * cp (2)",
    ),
    # lengths and batches
    (
        {"stages.2.seq_length": 100},
        "training.seq_length is 64, which does not divide the largest seq_length, the unit of shuffling "
        "(100)",
    ),
    (
        {"data.page_length": 512, "stages.2.seq_length": 96},
        "stages.long.seq_length is 96, which does not divide data.page_length (512); nearest allowed "
        "below: 64",
    ),
    (
        {"training.micro_batch": 3},
        "training.global_batch is 8, which is not divisible by training.micro_batch (3)",
    ),
    (
        {"parallel.gpus": 8},
        "training.global_batch is 8, which is not divisible by training.micro_batch (2) times the 8 "
        "data-parallel ranks",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence[:60] for _, sentence in REFUSED])
def test_refuses_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(small(**changes))
    message = str(caught.value)
    assert sentence in message
    assert message.startswith("recipe.yaml")
    assert "\n" not in message
    assert "pydantic" not in message and "Value error" not in message
    assert caught.value.exit_code == 2


def test_says_how_many_more() -> None:
    with pytest.raises(UserError, match=r"did you mean 'layers'\? \(and 2 more problems\)$"):
        load(small(**{"model.layrs": 1, "model.layers": None, "seed": "x", "lr.peak": -1.0}))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: [a", "r.yaml line 1, column 9 is not valid YAML: expected ',' or ']'"),
        ("a: 1\nb:\n\tc: 2", "r.yaml line 3, column 1 is not valid YAML: found character '\\t'"),
        (
            "a: 1\nb: 2\na: 3",
            "r.yaml line 3, column 1 is not valid YAML: key 'a' is given twice (first on line 1)",
        ),
        ("x: {u: 1, u: 2}", "key 'u' is given twice (first on line 1)"),
        ("a: *nothing", "is not valid YAML: found undefined alias 'nothing'"),
        ("", "r.yaml must be a mapping of fields such as 'name: my-run', but is empty"),
        ("- a\n- b", "must be a mapping of fields such as 'name: my-run', but is a list"),
        ("a: !!python/object:os.system {}", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_yaml_errors_name_the_line(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, "r.yaml")
    assert sentence in str(caught.value)


def test_anchors_repeat_a_mixture() -> None:
    text = (
        _yaml()
        .replace("mixture: {math: 1}", "mixture: *m")
        .replace("mixture: {web: 0.9", "mixture: &m {web: 0.9")
    )
    recipe = parse_recipe(text)
    assert recipe.stages[2].mixture == recipe.stages[0].mixture
    # What an anchor repeats is separate: an override changes one place only.
    recipe = parse_recipe(text, "r", ["stages.long.mixture.web=0.8", "stages.long.mixture.code=0.2"])
    assert recipe.stages[2].mixture == {"web": Fraction(4, 5), "code": Fraction(1, 5)}
    assert recipe.stages[0].mixture == {"web": Fraction(9, 10), "code": Fraction(1, 10)}


def test_merge_keys_work() -> None:
    text = _yaml() + "\noptimizer: &o {clip: 0.5}\ntail: {sft: {<<: {epochs: 1, seed: 3}, seed: 4}}"
    recipe = parse_recipe(text)
    assert recipe.tail is not None and recipe.tail.sft is not None
    assert (recipe.tail.sft.epochs, recipe.tail.sft.seed) == (1, 4)


def test_errors_name_the_line() -> None:
    lines = _yaml().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "decay_start" in line)
    text = "\n".join(lines).replace("decay_start", "decay_begin")
    with pytest.raises(
        UserError, match=rf"^r\.yaml line {number}: lr: 'decay_begin' is not a field; did you mean"
    ):
        parse_recipe(text, "r.yaml")
    with pytest.raises(UserError, match=r"^r\.yaml line 2: run_dir is 5"):
        parse_recipe(_yaml().replace("run_dir: runs/small", "run_dir: 5"), "r.yaml")


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"there is no recipe file 'nowhere\.yaml'"):
        load_recipe("nowhere.yaml")


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


def test_overrides() -> None:
    recipe = load(
        small(),
        "training.micro_batch=1",
        "stages.stable.until=1M",
        "stages.1.lr={end: 1e-4}",
        "stages.long.from.before_end=5 steps",
        "sources.web.max_epochs=2",
        "lr.peak=3e-3",
        "tail.dpo.epochs=3",
        "parallel.gpus=null",
    )
    assert recipe.training.micro_batch == 1
    assert recipe.stages[0].until == Amount(10**6, "tokens")
    assert recipe.stages[1].lr is not None and recipe.stages[1].lr.end == 1e-4
    assert recipe.stages[2].from_ is not None and recipe.stages[2].from_.before_end == Amount(5, "steps")
    assert recipe.sources["web"].max_epochs == 2
    assert recipe.lr.peak == 3e-3
    assert recipe.tail is not None and recipe.tail.dpo is not None and recipe.tail.dpo.epochs == 3
    assert recipe.parallel.gpus is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.micro_bach=4", "'training' has no field 'micro_bach'; did you mean 'micro_batch'?"),
        ("trainin.micro_batch=4", "a recipe has no field 'trainin'; did you mean 'training'?"),
        ("stages.stabel.until=4", "'stages' has no 'stabel'; did you mean 'stable'?"),
        ("stages.9.until=4", "'stages' has no '9'"),
        ("stages.long.from.before=4", "'stages.long.from' has no field 'before'"),
        ("sources.wep.tokens=4", "there is no source 'wep'; did you mean 'web'?"),
        ("seed.x=4", "'seed' is a single value and has no field 'x'"),
        ("seed", "is not of the form path.to.field=value"),
        ("a..b=1", "is not of the form path.to.field=value"),
        ("seed=[1", "the value in override 'seed=[1' line 1, column 3 is not valid YAML"),
        ("seed=abc", "seed is 'abc'; it should be a valid integer"),
        ("stages.long.mixture.math=0.5", "stages.long.mixture: the weights sum to 0.5, not 1"),
    ],
)
def test_override_errors(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(small(), override)
    assert sentence in str(caught.value)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(small()).seed = 3  # type: ignore[misc]


def _yaml() -> str:
    import yaml

    text = yaml.safe_dump(small(), sort_keys=False, default_flow_style=None)
    assert "mixture: {math: 1}" in text and "mixture: {web: 0.9" in text
    return text
