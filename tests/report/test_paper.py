"""The paper's tables as data: they add up as the paper's own averages say, and reach the page."""

from __future__ import annotations

import pytest

from megatron_smol.evals.suites import named_suite, suite_names
from megatron_smol.report import paper

STAGES = paper.tables()["stage_scores"]


@pytest.mark.parametrize("name", STAGES["averages"])
def test_the_averages_are_those_that_the_paper_prints(name: str) -> None:
    average = STAGES["averages"][name]
    for number, printed in enumerate(average["values"]):
        mean = sum(STAGES["scores"][task][number] for task in average["of"]) / len(average["of"])
        assert mean == pytest.approx(printed, abs=0.0101), (name, number)


def test_mixtures_sum_to_one_and_follow_each_other() -> None:
    mixtures = paper.tables()["mixtures"]
    end = 0.0
    for stage in mixtures["stages"]:
        assert stage["from_tokens"] == end
        end = stage["until_tokens"]
        assert sum(stage["sources"].values()) == pytest.approx(1, abs=1e-9)
        for group, share in stage["groups"].items():
            its = sum(stage["sources"].get(source, 0) for source in mixtures["groups"][group])
            assert its == pytest.approx(share, abs=1e-9), (stage["name"], group)
    assert end == STAGES["tokens"][-1] == 11e12
    assert sum(mixtures["context_extension"]["sources"].values()) == pytest.approx(1)


def test_every_row_has_a_value_for_every_model() -> None:
    tables = [table for table in paper.tables().values() if isinstance(table, dict) and "scores" in table]
    assert len(tables) == 5
    for table in tables:
        assert table["source"]
        assert {len(values) for values in table["scores"].values()} == {len(table.get("models", "1234"))}


def test_tasks_are_those_that_smol_eval_asks_and_the_paper_has() -> None:
    suites = [named_suite(name) for name in suite_names()]
    asked = {task for suite in suites for task in [*(item.label for item in suite.items), *suite.means]}
    asked.add("smollm2_mmlu_letter")  # in no suite, but among the tasks
    scored = {
        name
        for table in paper.tables().values()
        if isinstance(table, dict)
        for name in table.get("scores", ())
    }
    for task, name in paper.tables()["same_task"].items():
        assert name in scored
        assert task in asked


def test_references_are_shares_of_one_for_the_tasks_asked() -> None:
    base = paper.references(["piqa", "smollm2_mmlu_letter", "siqa"], instruct=False)
    by_name = {reference.name: reference.scores for reference in base}
    assert by_name["SmolLM2-1.7B after stage 4"] == {"piqa": 0.7764, "smollm2_mmlu_letter": 0.4887}
    assert by_name["SmolLM2-135M"] == {"piqa": 0.684}
    assert not any("Llama" in name for name in by_name)
    (instruct, *_) = paper.references(["arc"], instruct=True)
    assert (instruct.name, instruct.scores) == ("SmolLM2-1.7B-Instruct", {"arc": 0.517})
    assert paper.references(["siqa"], instruct=False) == []
