"""The page: whole, self-contained, well-formed, and never stopped by a file that is not there yet."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_smol.recipe.plan import Plan
from megatron_smol.report.collect import FILES
from megatron_smol.report.figures import binned, running_mean
from megatron_smol.report.render import duration, write_report
from megatron_smol.report.style import short
from tests.report.fake_run import keep_lines, small_plan, write_run


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "small", plan)).read_text()


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_finished_run_has_every_part(page: str) -> None:
    assert headings(page) == [
        "Loss and learning rate",
        "Mixture of each stage",
        "Tokens and epochs of each source",
        "Validation loss of each source",
        "Throughput",
        "What it writes",
        "How it was made",
    ]
    assert ">complete<" in page
    assert "all 4 stages drew exactly the planned windows" in page
    assert "ledger.json says the same to the token" in page
    assert "vocab_size: 512" in page  # the recipe
    assert "2.13.0+cpu" in page


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    assert "<script" not in page
    assert "@import" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert not re.findall(r"url\((?!#)", page)


def test_pictures_are_well_formed_and_their_ids_do_not_meet(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 8  # four, each for a wide page and for a phone
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert set(root.attrib) == {"viewBox", "role"}  # no size of its own: it scales with the page
        ids = {element.get("id") for element in root.iter() if element.get("id")}
        assert set(re.findall(r"#([mp][0-9a-f]{8,})", picture)) <= ids
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


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


def test_binning_keeps_the_ends_and_the_mean() -> None:
    x, y = binned(range(1, 10_001), range(10_000), points=100)
    assert len(x) == 100
    assert x[-1] == 10_000
    assert np.mean(y) == pytest.approx(4999.5)
    assert list(binned([1, 2], [3, 4], points=5)[1]) == [3, 4]


def test_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert running_mean([0, 3, 6, 9], 1).tolist() == [1.5, 3, 6, 7.5]
    assert running_mean([5.0], 3).tolist() == [5.0]


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
