"""Evaluations in the report: who continues whom, what changed and by how much, and no section where there are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.evals.results import append_row, write_samples
from megatron_smol.report.collect import collect
from megatron_smol.report.evals import Evals, collect_evals
from tests.report.fake_run import small_plan, write_report, write_run
from tests.report.page import chart, lines

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
    write_scores(run, "c", 21, **at_stage_end("long"))
    page = write_report(run).read_text()
    assert "<h2>Evaluations</h2>" in page
    scores = lines(chart(page, "acc (share of 1)", "arc_easy"))
    assert set(scores) == {"trunk", "long"}  # the paper has no figure for arc_easy alone
    ends = [at_stage_end(name)["tokens"] for name in ("stable", "decay", "long")]
    assert (scores["trunk"]["x"], scores["trunk"]["y"]) == (ends[:2], [0.25, 0.5])
    assert scores["trunk"]["errors"] == [0.05, 0.05]
    assert scores["long"]["x"] == [ends[0], ends[2]]  # from where it leaves: before decay's end
    assert re.search(
        r'0\.5000 ± 0\.0500 <span class="good">\+0\.2500</span></td><td>0\.7500 ± 0\.0500</td>', page
    )
    assert "<td>0.2500 ± 0.0500</td><td></td>" in page


def test_smollm2_stands_beside_the_run_where_the_task_is_the_same(run: Path) -> None:
    for name, right in (("stable", 10), ("decay", 20)):
        write_scores(run, name, right, task="piqa", **at_stage_end(name))
        write_scores(run, name, right, task="siqa", fingerprint=f"{name} {right}", **at_stage_end(name))
    page = write_report(run).read_text()
    paper = lines(chart(page, "acc (share of 1)", "piqa"))["SmolLM2-1.7B (paper)"]
    assert paper["y"] == [0.7639, 0.765, 0.7726, 0.7764]
    end = max(stage.end_tokens for stage in small_plan().stages)
    assert paper["x"] == pytest.approx([end * share / 11 for share in (6, 8, 10, 11)], rel=1e-6)
    assert "SmolLM2-1.7B (paper)" not in lines(chart(page, "acc (share of 1)", "siqa"))
    rows = re.findall(r'<tr class="paper"><td>(.*?) <span.*?</td>(.*?)</tr>', page)
    assert ("SmolLM2-135M", "<td>0.6840</td><td></td>") in rows


def test_inside_the_chat_template_smollm2_is_the_instruct_model(run: Path) -> None:
    write_scores(run, "decay", 20, task="piqa", chat_template=True, **at_stage_end("decay"))
    page = write_report(run).read_text()
    assert set(lines(chart(page, "acc (share of 1)", "piqa"))) == {"trunk"}
    assert "SmolLM2-1.7B-Instruct <span" in page and "after stage 1 <span" not in page


def test_an_older_model_of_the_same_name_is_left_out(run: Path) -> None:
    write_scores(run, "runs/small/sft", 5)
    write_scores(run, "runs/small/sft", 25)
    (model,) = collected(run).models
    assert model.figures["arc_easy"][0] == 25 / QUESTIONS
    page = write_report(run).read_text()
    assert "0.6250 ± 0.0500</td>" in page and "0.1250" not in page  # numbers, and nothing to draw


def test_models_without_a_common_task(run: Path) -> None:
    write_scores(run, "a", 10, **at_stage_end("stable"))
    write_scores(run, "b", 20, task="piqa", **at_stage_end("decay"))
    assert [model.before for model in collected(run).models] == [None, None]
    write_report(run)


def test_no_evaluation_no_section(run: Path) -> None:
    assert collect_evals(collect(run)) is None
    assert "<h2>Evaluations" not in write_report(run).read_text()
