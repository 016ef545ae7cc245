"""Several runs on one page, ablations, and the page of a run that still trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.errors import DataError, UserError
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.plan import make_plan
from megatron_smol.report.render import Report
from megatron_smol.report.watch import keep_writing
from tests.report.fake_run import RECIPE, keep_lines, small_plan, write_run
from tests.report.page import chart, charts, headings, lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "small", small_plan())


def write_ablation(folder: Path) -> Path:
    def cell(mean: float, difference: float | None = None, p: float | None = None) -> dict[str, Any]:
        return {"mean": mean, "error": 0.01, "values": [mean], "difference": difference, "p": p}

    folder.mkdir()
    cells = {
        "good": {"loss:mean": cell(5.1, -0.2, 0.01), "piqa:acc": cell(0.6, 0.1, 0.2)},
        "control": {"loss:mean": cell(5.3), "piqa:acc": cell(0.5)},
        "noise": {"loss:mean": cell(5.9, 0.6, 0.01), "piqa:acc": cell(0.4, -0.1, 0.04)},
    }
    results = {
        "rank_by": "loss:mean",
        "arms": list(cells),
        "metrics": ["loss:mean", "piqa:acc"],
        "cells": cells,
        "tokens": dict.fromkeys(cells, 32_000),
        "seconds": dict.fromkeys(cells, 40.0),
        "epochs": {},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_a_page_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    for output, why in ((tmp_path, "Is a directory"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(UserError, match=f"the page cannot be written to {output}: {why}"):
            Report([run], output).write()
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_runs_are_drawn_on_the_same_axes_with_what_differs(run: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("name: small", "name: other").replace("peak: 3e-3", "peak: 1e-3")
    other = write_run(tmp_path / "other", make_plan(parse_recipe(text)))
    for folder in (run, other):
        (folder / "versions.json").write_text('{"device": "NVIDIA H200, NCCL", "ranks": "8"}')
    report = Report([run, other], tmp_path / "both.html")
    assert report.write()
    page = (tmp_path / "both.html").read_text()
    loss = chart(page, "training loss (nats per token)")
    assert {line["group"] for line in loss["lines"]} == {"small", "other"}
    for one in charts(page):  # a name in a legend once
        named = [line["group"] for line in one["lines"] if line.get("named", True)]
        assert sorted(named) == sorted({line["group"] for line in one["lines"]}), one["about"]
    chart(page, "MFU (% of the bf16 peak)")
    assert len({line["colour"] for line in loss["lines"]}) == 2
    rates = chart(page, "learning rate (per step)")["lines"]
    highest = {
        name: max(max(line["y"]) for line in rates if line["group"] == name) for name in ("small", "other")
    }
    assert highest == {"small": 3e-3, "other": 1e-3}
    for source in ("docs", "code", "math"):
        assert {"small", "other"} <= set(lines(chart(page, "validation loss (nats per token)", source)))
    assert "<td><code>lr.peak</code></td>" in page and "<code>seed</code>" not in page
    assert not (run / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "again", small_plan())
    report = Report([run, other], tmp_path / "both.html")
    report.write()
    loss = chart(report.path.read_text(), "training loss (nats per token)")
    assert {line["group"] for line in loss["lines"]} == {str(run), str(other)}


def test_a_run_given_twice_or_a_folder_that_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given twice"):
        Report([run, run / ".." / "small"])
    with pytest.raises(UserError, match=r"no folder .*nowhere for --output"):
        Report([run], tmp_path / "nowhere" / "page.html")


def test_an_ablation_is_a_table_on_the_page_of_its_run(run: Path, tmp_path: Path) -> None:
    report = Report([run, write_ablation(tmp_path / "math")])
    report.write()
    assert report.path == run / "report.html"
    page = report.path.read_text()
    assert "Ablation: math" in headings(page)
    assert '<td>5.1000 ± 0.0100 <span class="good">-0.2000</span></td>' in page
    assert '<td>0.6000 ± 0.0100 <span class="">+0.1000</span></td>' in page  # p 0.2: no colour
    assert '<span class="bad">-0.1000</span>' in page and '<span class="bad">+0.6000</span>' in page
    assert page.index("<td>good</td>") < page.index("<td>control</td>") < page.index("<td>noise</td>")


def test_an_ablation_alone(tmp_path: Path) -> None:
    report = Report([write_ablation(tmp_path / "math")])
    report.write()
    page = (tmp_path / "math" / "report.html").read_text()
    assert headings(page)[0] == "Ablation: math" and len(charts(page)) == 0


def test_a_damaged_ablation_is_one_sentence(tmp_path: Path) -> None:
    folder = write_ablation(tmp_path / "math")
    (folder / "results.json").write_text('{"rank_by": "loss:mean"}')
    with pytest.raises(DataError, match=r"results\.json is damaged .* smol ablate CONFIG --results"):
        Report([folder]).write()


def test_watching_follows_the_run_and_ends_with_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (run / "metrics.jsonl").read_text()
    keep_lines(run / "metrics.jsonl", 40, and_half=True)
    pages: list[str] = []

    def a_while_later(seconds: float) -> None:
        assert seconds == 7
        pages.append((run / "report.html").read_text())
        if len(pages) == 2:
            (run / "metrics.jsonl").write_text(whole)
        else:
            rows = whole.splitlines(keepends=True)
            (run / "metrics.jsonl").write_text("".join(rows[:80]))

    keep_writing(Report([run]), 7, a_while_later)
    assert len(pages) == 2
    assert 'data-every="7"' in pages[0] and "34% of the steps" in pages[0]
    assert "68% of the steps" in pages[1]
    last = (run / "report.html").read_text()
    assert "data-every=" not in last and ">complete<" in last
    assert "page 3" in capsys.readouterr().err


def test_interrupted_watching_leaves_a_page_that_does_not_reload(run: Path) -> None:
    keep_lines(run / "metrics.jsonl", 40)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    keep_writing(Report([run]), 7, interrupted)
    page = (run / "report.html").read_text()
    assert "data-every=" not in page and "34% of the steps" in page
