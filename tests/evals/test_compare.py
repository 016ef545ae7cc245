"""Differences and their standard errors, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.errors import UserError
from megatron_smol.evals.compare import Delta, Side, compare, open_side, paired_differences, standard_error
from megatron_smol.evals.evaluate import _means
from megatron_smol.evals.results import append_row, find_row, load_rows, newest, read_samples, write_samples
from megatron_smol.evals.suites import Item, Suite

A = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
B = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0]  # two more right, none lost


def row(value: float, n: int = 8, **changes: Any) -> dict[str, Any]:
    figure = {"value": value, "stderr": 0.1, "higher_is_better": True}
    asked = {
        "definition": "d",
        "data": "x",
        "limit": None,
        "chat_template": False,
        "max_length": None,
        "dtype": "auto",
    }
    model = {
        "format": 1,
        "model": "m",
        "fingerprint": "f" * 64,
        "tokens": None,
        "task": "arc_easy",
        "samples": None,
    }
    return {**model, **asked, "n": n, "metric": "acc", "metrics": {"acc": figure}, **changes}


def side(folder: Path, scores: list[float], fingerprint: str, order: int = 1, **changes: Any) -> Side:
    """Results with samples; equal questions (the last two) are told apart by their order."""
    hashes = ["q0", "q1", "q2", "q3", "q4", "q5", "twin", "twin"]
    results = folder / "evals.jsonl"
    one = row(sum(scores) / len(scores), fingerprint=fingerprint * 64, model=fingerprint, **changes)
    samples = [{"doc_hash": h, "scores": {"acc": s}} for h, s in zip(hashes, scores, strict=True)]
    one["samples"] = write_samples(results, one, samples[::order])
    append_row(results, one)
    return Side(fingerprint, results, {"arc_easy": one})


@pytest.mark.parametrize(("errors", "mean"), [((0.3, 0.4), 0.25), ((0.3, None), None), ((None, None), None)])
def test_a_mean_knows_its_error_only_where_all_parts_do(
    tmp_path: Path, errors: tuple[float | None, ...], mean: float | None
) -> None:
    parts = [
        row(0.5, task=task, cut=0, seconds=1.0, suite="pair")
        | {"metrics": {"acc": {"value": 0.5, "stderr": error, "higher_is_better": True}}}
        for task, error in zip("ab", errors, strict=True)
    ]
    suite = Suite("pair", [Item("a"), Item("b")], means={"both": ["a", "b"]})
    (found,) = _means(tmp_path / "evals.jsonl", [], suite, parts)
    assert found["metrics"]["mean"]["stderr"] == (mean if mean is None else pytest.approx(mean))


def test_the_difference_is_taken_question_by_question(tmp_path: Path) -> None:
    (delta,) = compare(side(tmp_path, A, "a"), side(tmp_path, B, "b"))
    mean, pairs = 2 / 8, 8
    by_hand = math.sqrt((2 * (1 - mean) ** 2 + 6 * mean**2) / 7 / pairs)
    assert delta.b - delta.a == pytest.approx(mean)
    assert delta.stderr == pytest.approx(by_hand) and delta.pairs == 8
    assert delta.verdict == "within noise"  # 0.25 against 2 x 0.164
    assert standard_error([0.5, 0.5, 0.5]) == 0.0


def test_questions_are_paired_by_content_not_by_place() -> None:
    a = [("x", 1.0), ("y", 0.0), ("twin", 1.0), ("twin", 0.0)]
    b = [("twin", 1.0), ("y", 1.0), ("x", 1.0), ("twin", 0.0), ("z", 0.0)]
    assert paired_differences(a, b) == [0.0, 1.0, 0.0, 0.0]
    assert paired_differences([("x", [True, False])], [("x", [True])]) == []


def test_without_samples_the_errors_are_of_two_independent_figures(tmp_path: Path) -> None:
    first, second = side(tmp_path, A, "a"), side(tmp_path, B, "b")
    (tmp_path / second.rows["arc_easy"]["samples"]).unlink()
    (delta,) = compare(first, second)
    assert delta.pairs == 0 and delta.stderr == pytest.approx(math.hypot(0.1, 0.1))
    second.rows["arc_easy"]["metrics"]["acc"]["stderr"] = None
    assert compare(first, second)[0].verdict == "unknown"


def test_pairs_must_be_all_of_the_questions(tmp_path: Path) -> None:
    second = side(tmp_path, B, "b", n=9)
    (delta,) = compare(side(tmp_path, A, "a"), second)
    assert delta.pairs == 0


@pytest.mark.parametrize(
    ("change", "higher", "verdict"),
    [(0.21, True, "better"), (-0.21, True, "worse"), (-0.21, False, "better"), (0.19, True, "within noise")],
)
def test_verdicts(change: float, higher: bool, verdict: str) -> None:
    assert Delta("t", "acc", 0.5, 0.5 + change, 0.1, 10, higher).verdict == verdict


def test_asked_otherwise_is_said(tmp_path: Path) -> None:
    (delta,) = compare(side(tmp_path, A, "a"), side(tmp_path, B, "b", chat_template=True, limit=8))
    assert delta.note == "asked otherwise: limit, chat_template"


def test_a_file_stands_for_its_furthest_model(tmp_path: Path) -> None:
    side(tmp_path, A, "a", tokens=200)
    side(tmp_path, B, "b", tokens=100)
    opened = open_side(str(tmp_path / "evals.jsonl"))
    assert opened.rows["arc_easy"]["model"] == "a" and "(a)" in opened.name
    (tmp_path / "checkpoints").mkdir()
    assert open_side(str(tmp_path)).rows == opened.rows


def test_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="has no results; make some with smol eval"):
        open_side(str(tmp_path / "empty.jsonl"))
    other = Side("o", tmp_path, {"piqa": row(0.5, task="piqa")})
    with pytest.raises(UserError, match="a and o share no task: arc_easy against piqa"):
        compare(side(tmp_path, A, "a"), other)


def test_rows_are_whole_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "evals.jsonl"
    append_row(path, row(0.5))
    with path.open("a") as file:
        file.write('{"format": 1, "task": "to')  # a kill in the middle of a row
    append_row(path, row(0.6, limit=10))
    rows = load_rows(path)
    assert [r["metrics"]["acc"]["value"] for r in rows] == [0.5, 0.6]
    assert find_row(rows, row(0, limit=10)) == rows[1] and find_row(rows, row(0)) == rows[0]
    for key, other in {
        "fingerprint": "g",
        "task": "piqa",
        "definition": "e",
        "data": "y",
        "chat_template": True,
        "max_length": 9,
        "dtype": "float32",
    }.items():
        assert find_row(rows, row(0, **{key: other})) is None
    assert newest(rows) == {"arc_easy": rows[1]}
    with path.open("a") as file:
        file.write('{"format": 2}\n')
    with pytest.raises(UserError, match="rows of format 2, this version reads 1"):
        load_rows(path)


def test_samples_have_a_file_for_each_way_of_asking(tmp_path: Path) -> None:
    names = {
        write_samples(tmp_path / "evals.jsonl", row(0, **c), [])
        for c in ({}, {"limit": 3}, {"data": "z"}, {"dtype": "x"})
    }
    assert len(names) == 4
    assert read_samples(tmp_path / "evals.jsonl", {"samples": names.pop()}) == []
    assert read_samples(tmp_path / "evals.jsonl", {"samples": "evals/gone.jsonl.gz"}) is None
