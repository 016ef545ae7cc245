"""Incidents with their documents, goodput and MFU: what the files say, and nothing where they say nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_smol.recipe.flops import flops_per_token
from megatron_smol.report.collect import collect
from megatron_smol.report.health import collect_health
from megatron_smol.slurm.legs import append_row
from tests.report.fake_run import small_plan, write_lines, write_report, write_run
from tests.report.page import chart
from tests.tiny import environment

SPIKE = {
    "at": 1_790_000_000.0,
    "stage": "stable",
    "stage_index": 0,
    "step": 33,
    "decision": "skip",
    "reason": "loss spike 9.1 <usual 5.9>",
    "documents": {
        "docs": {"data/docs/shard-00000": [1, 5, 2345]},
        "code": {"data/code/s-1": list(range(40))},
    },
}
HANG = {
    "at": 1_790_000_050.0,
    "stage_index": 1,
    "step": 70,
    "what": "hang",
    "decision": "restart",
    "reason": "hang of rank 3",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "small", small_plan())


def test_incidents_are_listed_with_their_documents_and_marked_on_the_loss(run: Path) -> None:
    write_lines(run / "incidents.jsonl", [SPIKE, HANG])
    page = write_report(run).read_text()
    assert "loss spike 9.1 &lt;usual 5.9&gt;" in page
    assert "docs shard-00000: 1, 5, 2,345" in page
    assert "code s-1: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 28 more" in page
    assert f"smol inspect {run}/recipe.yaml --step 33 --stage stable" in page
    marked = [m for m in chart(page, "training loss (nats per token)")["marks"] if m["kind"] == "incident"]
    assert [(m["x"], m["label"]) for m in marked] == [(33 * 8 * 128, "skip"), (70 * 8 * 128, "restart")]
    assert "<td>2026-09-21 14:14:10</td><td>decay</td><td>70</td><td>restart</td>" in page


def test_lines_that_a_full_disk_left_torn_are_no_rows(run: Path) -> None:
    """`append_row` leaves them, and goes on behind them."""
    end = {"at": 1_790_000_090.0, "event": "end", "job": "17", "nodes": ["a"], "seconds": 88.0, "code": 0}
    for name, row in (("incidents.jsonl", SPIKE), ("legs.jsonl", end)):
        (run / name).write_text('{"at": 1790000000.0, "eve\n')
        append_row(run / name, row)
    health = collect_health(collect(run))
    assert [one.decision for one in health.incidents] == ["skip"] and [leg["job"] for leg in health.legs] == [
        "17"
    ]


def test_without_incidents_the_page_says_so(run: Path) -> None:
    page = write_report(run).read_text()
    assert "No incident was recorded." in page and "Goodput is not known" in page
    assert "No MFU: the peak of this device is not listed." in page


def test_mfu_is_that_of_the_trainer(run: Path) -> None:
    (run / "versions.json").write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3, NCCL", "ranks": "8"}))
    record = collect(run)
    mfu = collect_health(record).mfu["long"]
    speed = sorted(record.stages[3].series.tokens_per_s.tolist())
    median = (speed[5] + speed[6]) / 2  # of twelve steps
    plan = small_plan()
    assert mfu == pytest.approx(flops_per_token(plan.recipe.model, 512) * median / (989.4e12 * 8))
    page = write_report(run).read_text()
    lines = {line["label"]: line["y"] for line in chart(page, "MFU (% of the bf16 peak)")["lines"]}
    assert lines["long"][0] == pytest.approx(mfu, rel=1e-4)


def test_goodput_is_time_in_steps_over_wall_time(run: Path) -> None:
    (run / "log.txt").write_text(
        "2026-11-21 15:45:00 2 ranks\nno time here\n2026-11-21 15:45:10 == stable\n2026-11-21 15:46:40 done\n"
    )
    record = collect(run)
    health = collect_health(record)
    assert health.wall_seconds == 100
    assert health.goodput == pytest.approx(sum(stage.seconds for stage in record.stages) / 100)


def test_starts_of_a_job_are_listed(run: Path) -> None:
    start = {"at": 1_790_000_000.0, "event": "start", "job": "17"}
    end = {
        "at": 1_790_000_090.0,
        "event": "end",
        "job": "17",
        "nodes": ["a", "b"],
        "seconds": 88.0,
        "code": 75,
    }
    write_lines(run / "legs.jsonl", [start, end | {"action": "requeue", "reason": "a node was lost"}])
    page = write_report(run).read_text()
    assert "Starts of the job: 1" in page
    assert "<td>17</td><td>2</td><td>88.0</td><td>75</td><td>requeue</td>" in page


def test_what_only_reads_files_does_not_wait_for_torch() -> None:
    code = (
        "import sys, megatron_smol.report.render, megatron_smol.slurm.status; "
        "print({'torch', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
