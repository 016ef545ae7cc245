"""What a report knows about a run: sums along lineages, agreement with the plan, and what is absent."""

import json
from pathlib import Path

import pytest

from megatron_smol.errors import DataError, UserError
from megatron_smol.recipe.plan import Plan
from megatron_smol.report.collect import FILES, collect
from tests.report.fake_run import keep_lines, small_plan, write_run


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def run_dir(tmp_path: Path, plan: Plan) -> Path:
    return write_run(tmp_path / "small", plan)


def test_what_a_finished_run_read_is_what_was_planned(run_dir: Path, plan: Plan) -> None:
    run = collect(run_dir)
    assert run.complete
    assert run.missing == []
    assert [stage.agrees_with_plan for stage in run.stages] == [True] * 4
    assert run.ledger_agrees is True
    for source in run.sources:
        assert source.epochs == pytest.approx(plan.epochs()[source.name], abs=1e-12)
        assert source.tokens_read == sum(stage.tokens_drawn(source.name) for stage in plan.stages)


def test_a_window_from_another_source_is_noticed(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    row = next(row for row in rows if row["drawn"].get("docs") and row["drawn"].get("code"))
    row["drawn"]["docs"] -= 1
    row["drawn"]["code"] += 1
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = collect(run_dir)
    assert [stage.agrees_with_plan for stage in run.stages] == [False, True, True, True]
    assert run.ledger_agrees is False


def test_a_running_run_counts_only_what_it_has_read(run_dir: Path) -> None:
    keep_lines(run_dir / "metrics.jsonl", 70, and_half=True)  # 10 steps into the second stage
    keep_lines(run_dir / "validation.jsonl", 3)
    run = collect(run_dir)
    assert [len(stage.series) for stage in run.stages] == [60, 10, 0, 0]
    assert [stage.complete for stage in run.stages] == [True, False, False, False]
    assert run.stages[1].agrees_with_plan is None
    assert set(run.stages[1].validation) == {"start"}
    assert "stage anneal has not begun" in run.missing
    assert sum(source.tokens_read for source in run.sources) == 70 * 8 * 128


def test_a_damaged_line_in_the_middle_is_an_error_with_its_place(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 5 is damaged"):
        collect(run_dir)


@pytest.mark.parametrize("name", FILES)
def test_any_one_file_may_be_absent(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    assert any(line.startswith(f"no {name}") for line in collect(run_dir).missing)


def test_without_a_plan_the_metrics_say_what_they_can(run_dir: Path) -> None:
    (run_dir / "plan.json").unlink()
    run = collect(run_dir)
    assert [stage.name for stage in run.stages] == ["stable", "decay", "anneal", "long"]
    assert run.stages[3].start_tokens == 82 * 8 * 128
    assert not run.complete
    assert {source.name for source in run.sources} == {"docs", "code", "math"}


@pytest.mark.parametrize("content", [None, "a folder of something else"])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "elsewhere"
    if content:
        folder.mkdir()
        (folder / "notes.txt").write_text(content)
    with pytest.raises(UserError, match="run folder"):
        collect(folder)
