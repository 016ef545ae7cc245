"""Scores decide who stays: rounded or not, by language, by a share; and which domains are read again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document

from megatron_smol.curate.classifier import Classifier, Settings
from megatron_smol.curate.domains import Domains
from megatron_smol.curate.kept import FewDropped
from megatron_smol.curate.scoring import Sampled, ScoreAtLeast
from megatron_smol.curate.steps import Sample, Score
from megatron_smol.errors import UserError


def scored(score: float | None, language: str = "") -> Document:
    return Document(text="x", id="1", metadata={"score": score, "language": language})


def test_scores_are_rounded_as_on_the_hub_unless_told_otherwise(tmp_path: Path) -> None:
    few = FewDropped(tmp_path)
    rounding, exact = ScoreAtLeast(Score(keep=3), few), ScoreAtLeast(Score(keep=2.6, rounded=False), few)
    assert [rounding.filter(scored(score)) is True for score in (2.49, 2.51, 3, 4.9)] == [
        False,
        True,
        True,
        True,
    ]
    assert [exact.filter(scored(score)) is True for score in (2.59, 2.6)] == [False, True]
    assert rounding.filter(scored(None)) == (False, "no_score")
    assert rounding.stats.stats["scored_2.5"].total == 2, "counted before anything is dropped"


def head(folder: Path, bias: float) -> None:
    """A classifier that gives every text the same score."""
    Classifier(Settings(), np.zeros(1 << 18), bias, {}).save(folder)


def test_each_language_has_its_head_and_its_threshold(tmp_path: Path) -> None:
    head(tmp_path / "Java", 2.2)
    head(tmp_path / "Go", 2.2)
    rule = Score(by="language", model=tmp_path, keep=3, keep_of={"Java": 2}, without_model=("HTML",))
    documents = [scored(None, language) for language in ("Java", "Go", "HTML", "Cobol")]
    step = ScoreAtLeast(rule, FewDropped(tmp_path / "few"))
    assert step.filter_batch(documents) == [True, (False, "score_below"), True, (False, "no_score")]
    assert [document.metadata["score"] for document in documents] == [2.2, 2.2, None, None]


def test_a_share_of_a_score_stays_and_always_the_same(tmp_path: Path) -> None:
    few, rule = FewDropped(tmp_path), Sample(shares={0: 0, 1: 0.3, 2: 1})
    documents = [Document(text=f"text {i}", id=str(i), metadata={"score": 1.2}) for i in range(2000)]
    kept = [Sampled(rule, few).filter(document) is True for document in documents]
    assert abs(sum(kept) / 2000 - 0.3) < 4 * (0.21 / 2000) ** 0.5
    assert kept == [Sampled(rule, few).filter(document) is True for document in documents]
    other = [
        Sampled(rule.model_copy(update={"seed": 1}), few).filter(document) is True for document in documents
    ]
    assert kept != other
    assert Sampled(rule, few).filter(scored(0.4)) == (False, "sampled_0")
    assert Sampled(rule, few).filter(scored(2)) is True and Sampled(rule, few).filter(scored(4)) is True
    assert Sampled(rule, few).filter(scored(None)) == (False, "no_score")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 2.5}, "set rounded: false"),
        ({"keep_of": {"Java": 2}}, "set `by`"),
        ({"without_model": ["HTML"]}, "set `by`"),
    ],
)
def test_rules_that_cannot_be_met(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Score.model_validate(wrong)
    with pytest.raises(ValueError, match="from 0 to 1, found 2"):
        Sample(shares={1: 2})


def test_a_classifier_that_is_not_there_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no classifier at"):
        Score(model=tmp_path / "none").build(FewDropped(tmp_path))


# --- domains -----------------------------------------------------------------------------------------------


def lists(tmp_path: Path) -> tuple[Path, Path]:
    ours, other = tmp_path / "domains.jsonl", tmp_path / "owm.jsonl"
    rows = [
        {"domain": "ten.org", "pages": 200, "scores": {"0": 190, "2": 4, "3": 6}},
        {"domain": "nine.org", "pages": 9, "scores": {"2": 9}},
        {"domain": "none.org", "pages": 500, "scores": {"0": 250, "1": 250}},
    ]
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text('{"domain": "owm.org", "pages": 10}\n{"domain": "small.org", "pages": 9}\n')
    return ours, other


def test_the_rule_for_domains(tmp_path: Path) -> None:
    files = lists(tmp_path)
    assert Domains(files=files).chosen() == {"ten.org", "owm.org"}
    assert Domains(files=files, min_pages=1, min_share=0.1).chosen() == {"nine.org", "owm.org", "small.org"}
    assert Domains(files=files[:1], min_score=3, min_pages=6).chosen() == {"ten.org"}


def test_mistakes_about_domains(tmp_path: Path) -> None:
    files = lists(tmp_path)
    with pytest.raises(UserError, match="nothing would be read"):
        Domains(files=files, min_pages=1000).chosen()
    with pytest.raises(UserError, match="no list of domains at"):
        Domains(files=(tmp_path / "no.jsonl",)).chosen()
    files[0].write_text("ten.org\n")
    with pytest.raises(UserError, match="line 1 is not"):
        Domains(files=files).chosen()
