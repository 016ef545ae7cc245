"""Evaluations in the report: who continues whom, what changed and by how much, and no section where there are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_smol.evals.results import append_row, write_samples
from megatron_smol.report.collect import collect
from megatron_smol.report.evals import Evals, collect_evals
from megatron_smol.report.render import write_report
from tests.report.fake_run import small_plan, write_run

QUESTIONS = 40


def write_scores(run: Path, model: str, right: int, task: str = "arc_easy", **where: Any) -> None:
    """A model that answers the first `right` of the questions, as `smol eval` records it."""
    value = right / QUESTIONS
    figure = {"value": value, "stderr": 0.05, "higher_is_better": True}
    row = {
        "format": 1,
        "model": model,
        "fingerprint": f"{model} {right}",
        "tokens": None,
        "stage": None,
        "step": None,
        "task": task,
        "definition": "d",
        "data": "x",
        "limit": None,
        "chat_template": False,
        "max_length": None,
        "dtype": "auto",
        "metric": "acc",
        "metrics": {"acc": figure},
        "n": QUESTIONS,
        **where,
    }
    samples = [{"doc_hash": f"q{i}", "scores": {"acc": float(i < right)}} for i in range(QUESTIONS)]
    row["samples"] = write_samples(run / "evals.jsonl", row, samples)
    append_row(run / "evals.jsonl", row)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "small", small_plan())


def at_stage_end(name: str) -> dict[str, Any]:
    stage = small_plan().stage(name)
    return {"stage": name, "step": stage.end_step, "tokens": stage.tokens_at(stage.end_step)}


def collected(run: Path) -> Evals:
    evals = collect_evals(collect(run))
    assert evals is not None
    return evals


def test_each_model_is_compared_with_the_one_it_continues(run: Path) -> None:
    # In another order than they were trained, as jobs end.
    for model, right in (("dpo", 39), ("sft", 38)):
        write_scores(run, f"runs/small/{model}", right)
    for name, right in (("long", 21), ("anneal", 30), ("decay", 20), ("stable", 10)):
        write_scores(run, f"runs/small/checkpoints/{name}", right, **at_stage_end(name))
    middle = small_plan().stage("stable")
    write_scores(
        run, "runs/small/checkpoints/stable-45", 8, stage="stable", step=45, tokens=middle.tokens_at(45)
    )
    evals = collected(run)
    found = [
        (model.name, model.before.name if model.before else None, [delta.verdict for delta in model.changes])
        for model in evals.models
    ]
    assert found == [
        ("stable step 45", None, []),
        ("stable step 60", "stable step 45", ["within noise"]),
        ("decay step 90", "stable step 60", ["better"]),
        # Both branches leave before their parent's end, which is not theirs.
        ("anneal step 65", "stable step 45", ["better"]),
        ("long step 94", "stable step 60", ["better"]),
        ("sft", "long step 94", ["better"]),
        ("dpo", "sft", ["within noise"]),
    ]
    (delta,) = evals.models[2].changes
    assert (delta.a, delta.b, delta.pairs) == (0.25, 0.5, QUESTIONS)  # question by question
    assert [model.name for model in evals.over_tokens] == [name for name, *_ in found[:5]]


def test_the_page_has_scores_changes_and_numbers(run: Path) -> None:
    write_scores(run, "a", 10, **at_stage_end("stable"))
    write_scores(run, "b", 20, **at_stage_end("decay"))
    write_scores(run, "b", 30, task="piqa", fingerprint="b 20", **at_stage_end("decay"))
    page = write_report(run).read_text()
    assert "<h2>Evaluations</h2>" in page
    pictures = [svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if "arc_easy" in svg]
    assert len(pictures) == 4  # scores and changes, for a wide page and for a phone
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert sum("tokens along the lineage" in svg and "piqa (acc)" in svg for svg in pictures) == 2
    assert sum("change of the score" in svg and "piqa" not in svg for svg in pictures) == 2
    assert "<td>0.5000 ± 0.0500</td><td>0.7500 ± 0.0500</td>" in page
    assert "<td>0.2500 ± 0.0500</td><td></td>" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_an_older_model_of_the_same_name_is_left_out(run: Path) -> None:
    write_scores(run, "runs/small/sft", 5)
    write_scores(run, "runs/small/sft", 25)
    (model,) = collected(run).models
    assert model.figures["arc_easy"][0] == 25 / QUESTIONS
    page = write_report(run).read_text()
    assert "change of the score" not in page and "0.6250 ± 0.0500" in page  # numbers, and nothing to draw


def test_models_without_a_common_task(run: Path) -> None:
    write_scores(run, "a", 10, **at_stage_end("stable"))
    write_scores(run, "b", 20, task="piqa", **at_stage_end("decay"))
    assert [model.before for model in collected(run).models] == [None, None]
    write_report(run)


def test_no_evaluation_no_section(run: Path) -> None:
    assert collect_evals(collect(run)) is None
    assert "Evaluations" not in write_report(run).read_text()
