"""What the card tells beside the funnel: scores before the threshold, repeated steps, epochs in a training recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_smol.curate.config import load_curation
from megatron_smol.curate.pipeline import curate
from megatron_smol.errors import UserError
from tests.data.conftest import train_tokenizer

RECIPE = Path(__file__).parent.parent.parent / "examples" / "smollm2_1.7b.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [
        {"text": f"Document {n} says this and that.", "score": n % 6, "url": f"http://s{n % 2}.org"}
        for n in range(60)
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "card", "inputs": {"paths": str(tmp_path / "raw.jsonl")}, "output": str(tmp_path / "out"), "tasks": 2,
        "workers": 1, "steps": [{"score": {"keep": 3}}, {"match": {"pattern": "7", "drop": True}}, {"score": {"keep": 9}}],
    }  # fmt: skip
    path = tmp_path / "curation.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def card(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "out/card.json").read_text())


def test_scores_before_the_threshold_and_a_step_that_drops_everything(config: Path, tmp_path: Path) -> None:
    curate(load_curation(config))
    about = card(tmp_path)
    first, second = about["histograms"]
    assert first["scores"] == [[float(score), 10] for score in range(6)]
    assert sum(count for _, count in second["scores"]) == about["funnel"][2]["kept"]
    assert [row["step"] for row in about["funnel"]] == ["read", "score", "match", "score"]
    assert (about["funnel"][3]["kept"], about["kept"]) == (0, [])
    assert set(about["dropped"]) == {"score", "match", "score (2)"}


def test_epochs_in_each_stage_of_a_recipe(config: Path, tmp_path: Path) -> None:
    tokenizer = str(train_tokenizer(tmp_path / "tokenizer"))
    settings = yaml.safe_load(config.read_text())
    settings["steps"] = settings["steps"][:2]
    config.write_text(yaml.safe_dump(settings))
    curate(load_curation(config))
    assert card(tmp_path)["epochs"] is None
    documents = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/documents").iterdir()}
    read = {"tokenizer": tokenizer, "epochs": {"recipe": str(RECIPE), "source": "stack_edu"}}
    curate(load_curation(config, read))
    epochs = card(tmp_path)["epochs"]
    assert {path: path.stat().st_mtime_ns for path in documents} == documents, "only the card is made again"
    stages = {row["stage"]: row for row in epochs["stages"]}
    assert epochs["tokens"] > 0 and len(stages) > 2
    for row in stages.values():
        assert row["epochs"] == pytest.approx(row["tokens"] / epochs["tokens"])
        assert row["epochs_at_end"] >= row["epochs"]
    assert "stack_edu" in (tmp_path / "out/card.html").read_text()


def test_mistakes_about_the_recipe_are_told_before_the_work(config: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"epochs": {"recipe": str(RECIPE), "source": "stack_edu"}}, "set `tokenizer` too"),
        ({"tokenizer": "t", "epochs": {"recipe": str(RECIPE)}}, "has no source 'card'"),
        ({"tokenizer": "t", "epochs": {"recipe": "none.yaml"}}, "no recipe file"),
    ):
        with pytest.raises(UserError, match=message):
            curate(load_curation(config, changes))
    assert not (tmp_path / "out/documents").exists()


def test_every_hit_of_contamination_is_named(config: Path, tmp_path: Path) -> None:
    """All of them in a file, the first on the card: document, benchmark, item, words, share."""
    items = [f"Document {n} says this and that." for n in range(0, 60, 3)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    step = {"decontaminate": {"files": [str(tmp_path / "items.jsonl")], "ngram": 6, "ratio": 1.0}}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"steps": [step]}))
    curate(load_curation(config))
    hits = [json.loads(line) for line in (tmp_path / "out/contamination.jsonl").read_text().splitlines()]
    assert sorted(hit["item"] for hit in hits) == list(range(1, 21))
    assert all(hit["document"] == f"raw.jsonl/{3 * hit['item'] - 2}" for hit in hits)
    assert hits[0]["ngram"] == "document 0 says this and that" and hits[0]["url"] == "http://s0.org"
    about = card(tmp_path)["contamination"]
    assert (
        about["hits"] == 20 and about["benchmarks"] == [["items.jsonl", 20]] and about["shown"] == hits[:12]
    )
    page = (tmp_path / "out/card.html").read_text()
    assert "20 documents held an item" in page and "document 3 says this and that" in page
