"""A recipe that changed under a run: refused with both values, or, for the learning rate, allowed and written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_smol.errors import UserError
from megatron_smol.recipe.load import load_recipe, parse_recipe
from megatron_smol.train.state import open_run_folder
from tests.checkpoint.test_store import make
from tests.recipe.recipes import EXAMPLES
from tests.tiny import TinyRun, rows
from tests.train.faulty import Fault, errors, run

CHANGES = {
    "lr.peak=1e-2": ("lr.peak", "0.02", "0.01"),
    "lr.warmup=2 steps": ("lr.warmup", "3 steps", "2 steps"),
    "training.seq_length=16": ("training.seq_length", "32", "16"),
    "stages.long.seq_length=32": ("data.page_length", "64", "32"),
    "training.global_batch=16": ("training.global_batch", "8", "16"),
    "model.vocab_size=704": ("model.vocab_size", "640", "704"),
    "stages.two.mixture={web: 0.6, code: 0.2, maths: 0.2}": ("stages.two.mixture", "0.5", "0.6"),
    "seed=4": ("seed", "3", "4"),
    "data.seed=6": ("data.seed", "5", "6"),
}


@pytest.fixture
def begun(tiny: TinyRun) -> TinyRun:
    """A run with a checkpoint."""
    open_run_folder(load_recipe(tiny.recipe))
    make(tiny.run / "checkpoints", "one", 0, 4)
    return tiny


@pytest.mark.parametrize(("change", "says"), CHANGES.items(), ids=[says[0] for says in CHANGES.values()])
def test_both_values_are_named(begun: TinyRun, change: str, says: tuple[str, ...]) -> None:
    before = (begun.run / "recipe.yaml").read_text()
    with pytest.raises(UserError) as refused:
        open_run_folder(load_recipe(begun.recipe, [change]))
    for part in (*says, "set it back to continue that run"):
        assert part in str(refused.value), str(refused.value)
    assert (begun.run / "recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        "stages.stable-3.from={stage: stable-1, before_end: 20000}",
        "stages.decay.megatron_order={cache: c, blend: b}",
    ],
)
def test_what_a_stage_did_not_have_is_a_change_too(tmp_path: Path, change: str) -> None:
    here = f"run_dir={tmp_path}"
    open_run_folder(load_recipe(EXAMPLES / "demo.yaml", [here]))
    make(tmp_path / "checkpoints", "decay", 3, 400)
    with pytest.raises(UserError, match=r"holds a run whose stages\.(stable-3\.from|decay\.megatron_order)"):
        open_run_folder(load_recipe(EXAMPLES / "demo.yaml", [here, change]))


def test_stages_and_their_sources_may_be_appended(begun: TinyRun) -> None:
    """Also to a run whose recipe.yaml an older version wrote, which lacks fields that came since."""
    recorded = begun.run / "recipe.yaml"
    old = yaml.safe_load(recorded.read_text())
    for section in ("optimizer", "fp8", "eval", "guard"):
        old.pop(section)
    old["data"].pop("over_epochs")
    recorded.write_text(yaml.safe_dump(old, sort_keys=False))
    more = yaml.safe_load(begun.recipe.read_text())
    more["sources"]["poems"] = more["sources"]["web"]
    more["stages"].append(
        {
            "name": "later",
            "from": {"stage": "two", "before_end": "1 steps"},
            "tokens": "2 steps",
            "mixture": {"poems": 1},
        }
    )
    open_run_folder(parse_recipe(yaml.safe_dump(more)))
    more["stages"][0]["mixture"] = {"poems": 0.5, "web": 0.5}
    with pytest.raises(UserError, match=r"stages\.one\.mixture"):
        open_run_folder(parse_recipe(yaml.safe_dump(more)))


def test_what_moves_neither_data_nor_weights_may_change(begun: TinyRun) -> None:
    free = [
        "parallel.tp=2",
        "training.micro_batch=1",
        "save.every=7 steps",
        "guard.spike=skip",
        "data.over_epochs=error",
    ]
    open_run_folder(load_recipe(begun.recipe, free))
    assert not (begun.run / "incidents.jsonl").exists()


def test_another_learning_rate_is_allowed_where_it_is_asked_for(begun: TinyRun) -> None:
    lower = ["lr.peak=1e-2", "stages.anneal.lr.end=1e-3", "guard.lr_may_change=true"]
    open_run_folder(load_recipe(begun.recipe, lower))
    open_run_folder(load_recipe(begun.recipe, lower))  # the next leg: nothing changed since
    (row,) = map(json.loads, (begun.run / "incidents.jsonl").read_text().splitlines())
    assert row["lasting"] and "after one-00000004: " in row["reason"]
    assert "lr.peak 0.02 -> 0.01" in row["reason"] and "stages.anneal.lr.end" in row["reason"]
    with pytest.raises(
        UserError, match=r"seed is 3, this recipe says 4; set it back to continue that run, or"
    ):
        open_run_folder(load_recipe(begun.recipe, [*lower, "seed=4"]))


@pytest.mark.faults
def test_a_run_goes_on_with_another_learning_rate(tiny: TinyRun) -> None:
    assert run(tiny, faults=(Fault("signal", "one", 5, value=0.0),)) == [75, 75], errors(tiny)
    assert run(tiny, "lr.peak=1e-2") == [2, 2]
    assert "guard.lr_may_change=true" in errors(tiny)
    assert run(tiny, "lr.peak=1e-2", "guard.lr_may_change=true") == [0, 0], errors(tiny)
    rates = {(row["stage"], row["step"]): row["lr"] for row in rows(tiny.run / "metrics.jsonl")}
    assert rates["one", 5] == 0.02 and rates["one", 6] == 0.01


@pytest.mark.parametrize("keep", [0, 300])
def test_a_damaged_record_of_the_recipe(begun: TinyRun, keep: int) -> None:
    recorded = begun.run / "recipe.yaml"
    content = recorded.read_bytes()
    recorded.write_bytes(content[:keep])
    with pytest.raises(
        UserError, match=r"recipe\.yaml.*what this run began with; if it was damaged .* remove it"
    ):
        open_run_folder(load_recipe(begun.recipe))
    recorded.unlink()
    open_run_folder(load_recipe(begun.recipe))
    assert recorded.read_bytes() == content
