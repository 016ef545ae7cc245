"""The page: whole, self-contained, well-formed, and never stopped by a file that is not there yet."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_smol.recipe.plan import Plan
from megatron_smol.report.collect import FILES
from megatron_smol.report.style import short
from megatron_smol.report.view import duration
from tests.report.fake_run import keep_lines, small_plan, write_report, write_run
from tests.report.page import chart, charts, headings, lines


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "small", plan)).read_text()


def test_a_finished_run_has_every_part(page: str) -> None:
    assert headings(page) == [
        "Loss and learning rate",
        "Mixture",
        "Tokens and epochs of each source",
        "Validation loss of each source",
        "Speed and health",
        "What it writes",
        "How it was made",
    ]
    assert ">complete<" in page
    assert "all 4 stages drew exactly the planned windows" in page
    assert "ledger.json says the same to the token" in page
    assert "vocab_size: 512" in page  # the recipe
    assert "2.13.0+cpu" in page


def test_the_page_loads_nothing(page: str) -> None:
    assert "@import" not in page
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "Permission is hereby granted" in page  # uPlot's licence goes with it
    assert len(page) < 400_000


def test_every_chart_says_what_its_axes_are(page: str) -> None:
    found = charts(page)
    assert len(found) == 7
    assert {one["y_label"] for one in found} == {
        "training loss (nats per token)",
        "learning rate (per step)",
        "share of the windows (%)",
        "share of the tokens (%)",
        "validation loss (nats per token)",
        "throughput (tokens/s)",
        "gradient norm (L2)",
    }
    assert {one["x_label"] for one in found} == {"tokens along the lineage", "tokens of SmolLM2-1.7B"}
    for one in found:
        for line in one["lines"]:
            assert len(line["x"]) == len(line["y"]) > 0
            assert line["x"] == sorted(line["x"])


def test_the_loss_is_drawn_by_stage_and_branches_begin_where_they_leave(page: str, plan: Plan) -> None:
    loss = lines(chart(page, "training loss (nats per token)"))
    assert set(loss) == {
        name + more for name in ("stable", "decay", "anneal", "long") for more in ("", ": single steps")
    }
    anneal = loss["anneal"]
    assert anneal["dash"] and not loss["decay"].get("dash")
    assert anneal["x"][0] == plan.stage("anneal").start_tokens
    stable = loss["stable"]
    assert anneal["y"][0] == pytest.approx(np.interp(anneal["x"][0], stable["x"], stable["y"]), rel=1e-3)
    assert (
        loss["stable: single steps"]["group"] == "stable" and loss["stable: single steps"]["named"] is False
    )
    assert len(loss["stable: single steps"]["x"]) == 60


def test_the_mixture_is_drawn_over_tokens_beside_the_plan(page: str, plan: Plan) -> None:
    mixture = lines(chart(page, "share of the windows (%)"))
    docs, planned = mixture["docs"], mixture["docs, planned"]
    assert (docs["stack"], planned["stack"]) == ("drawn", "planned")
    assert planned["x"] == [0, plan.stage("decay").start_tokens, plan.trunk[-1].end_tokens]
    assert planned["y"] == [0.9, 0.6, 0.6]
    assert docs["x"][-1] == plan.trunk[-1].end_tokens
    sources = [line for name, line in mixture.items() if "planned" not in name]
    for at in range(len(docs["x"])):
        assert sum(line["y"][at] for line in sources) == pytest.approx(1, abs=1e-4)
    drawn = [y for x, y in zip(docs["x"], docs["y"], strict=True) if x < plan.stage("decay").start_tokens]
    assert np.mean(drawn) == pytest.approx(0.9, abs=0.01)


def test_what_a_stage_changes_is_bold(page: str) -> None:
    bold = re.findall(r'<strong title="changed from ([^"]*)">([^<]*)</strong>', page)
    assert bold == [("128", "512"), ("8", "2")]  # the branch `long`: window length and batch


def test_every_file_is_there_with_its_hash(page: str, plan: Plan, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "small", plan)
    page = write_report(run_dir).read_text()
    for name in FILES:
        digest = hashlib.sha256((run_dir / name).read_bytes()).hexdigest()
        assert re.search(
            rf"<td>{re.escape(name)}</td><td>[\d,]+</td><td class=\"left hash\">{digest}<", page
        ), name
    assert "report.html</td>" not in page


def test_text_in_chart_data_cannot_end_its_element(tmp_path: Path, plan: Plan) -> None:
    run_dir = write_run(tmp_path / "small", plan)
    for name in ("metrics.jsonl", "plan.json"):
        text = (run_dir / name).read_text().replace('"docs"', '"</script><b>"')
        (run_dir / name).write_text(text)
    page = write_report(run_dir).read_text()
    assert "</script><b>" not in page
    assert "</script><b>" in lines(chart(page, "share of the windows (%)"))


def test_text_of_a_model_is_text(page: str) -> None:
    assert "a list of &lt;b&gt;objects&lt;/b&gt; &amp; names." in page
    assert '<span class="prompt">2 + 2 =</span> 4' in page  # the prompt is not repeated


def test_the_same_run_gives_the_same_page(page: str, tmp_path: Path, plan: Plan) -> None:
    again = write_report(write_run(tmp_path / "small", plan)).read_text()
    footer = re.compile(r"<footer>.*?</footer>")
    assert footer.sub("", again) == footer.sub("", page)


@pytest.mark.parametrize("name", ["plan.json", "metrics.jsonl", "recipe.yaml"])
def test_any_one_file_may_be_absent(tmp_path: Path, plan: Plan, name: str) -> None:
    run_dir = write_run(tmp_path / "small", plan)
    (run_dir / name).unlink()
    assert f"no {name}" in write_report(run_dir).read_text()


@pytest.mark.parametrize("steps", [0, 1, 61])
def test_a_run_that_is_still_training_gives_a_partial_report(tmp_path: Path, plan: Plan, steps: int) -> None:
    run_dir = write_run(tmp_path / "small", plan)
    keep_lines(run_dir / "metrics.jsonl", steps, and_half=True)
    keep_lines(run_dir / "validation.jsonl", 1)
    (run_dir / "ledger.json").unlink()
    page = write_report(run_dir).read_text()
    assert "This report is partial" in page
    assert f">{steps / 117:.0%} of the steps<" in page
    assert ("No step has been recorded yet" in page) == (steps == 0)


def test_a_plan_alone_gives_a_report(tmp_path: Path, plan: Plan) -> None:
    run_dir = write_run(tmp_path / "small", plan)
    for name in FILES:
        if name != "plan.json":
            (run_dir / name).unlink()
    assert "0% of the steps" in write_report(run_dir).read_text()


def test_nothing_is_left_beside_the_report(tmp_path: Path, plan: Plan) -> None:
    run_dir = write_run(tmp_path / "small", plan)
    assert write_report(run_dir) == run_dir / "report.html"
    assert {path.name for path in run_dir.iterdir()} == {*FILES, "report.html"}


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999.7, "1k"), (150_000, "150k"), (2_982_842, "2.98M"), (10.989e12, "11T")]
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.52, "0.52 s"),
        (48.2, "48 s"),
        (60, "1 min"),
        (206, "3 min 26 s"),
        (18_720, "5 h 12 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
