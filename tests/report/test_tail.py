"""SFT and DPO in a run's report: their curves and figures, and a report as before where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_smol.report.tail import collect_tail
from tests.report.fake_run import small_plan, write_report, write_run
from tests.report.page import charts, lines


def write_tail(run: Path, kind: str, steps: int, finished: bool = True) -> None:
    folder = run / kind
    folder.mkdir()
    extra = [
        {"margin": 0.1 * step, "accuracy": min(1.0, 0.05 * step)} if kind == "dpo" else {}
        for step in range(steps + 1)
    ]
    rows = [{"step": step, "loss": 2.0 / step, **extra[step]} for step in range(1, steps + 1)]
    held = [{"step": step, "loss": 3.0 / (step + 1), **extra[step]} for step in (0, steps)]
    for name, content in (("metrics.jsonl", rows), ("validation.jsonl", held)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    if finished:
        (folder / "tail.json").write_text(json.dumps({"dataset": "data/demo/chat/sft.jsonl"}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "small", small_plan())


def test_the_tail_is_drawn_with_units(run: Path) -> None:
    write_tail(run, "sft", 20)
    write_tail(run, "dpo", 10, finished=False)
    page = write_report(run).read_text()
    assert "<h2>Fine-tuning</h2>" in page
    found = {one["y_label"]: lines(one) for one in charts(page) if one["x_label"] == "optimizer steps"}
    assert set(found) == {
        "SFT loss (nats per token)",
        "DPO loss (nats per pair)",
        "DPO margin (beta × nats)",
        "DPO accuracy (share of pairs)",
    }
    sft = found["SFT loss (nats per token)"]
    assert (sft["held out"]["x"], sft["held out"]["y"]) == ([0, 20], [3, 0.14286])
    assert sft["single steps"]["y"][:2] == [2, 1] and sft["training"]["x"] == list(range(1, 21))
    assert "2.0000 → 0.1000" in page and "3.0000 → 0.1429" in page  # SFT: training, held out
    assert ">10 so far<" in page and "+1.000" in page and "50.0%" in page


def test_one_of_them_alone(run: Path) -> None:
    write_tail(run, "sft", 3)
    assert [stage.kind for stage in collect_tail(run)] == ["sft"]
    page = write_report(run).read_text()
    assert "SFT loss (nats per token)" in page and "DPO margin (beta" not in page


def test_no_tail_no_section(run: Path) -> None:
    (run / "sft").mkdir()  # made, nothing done yet
    assert "Fine-tuning" not in write_report(run).read_text()
