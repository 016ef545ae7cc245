"""A classifier learns labels that length does not give away, says how well, and is the same after loading."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_smol.commands.classifier import classifier
from megatron_smol.curate.classifier import Classifier, Settings, train
from megatron_smol.curate.head import confusion, macro_f1
from megatron_smol.errors import DataError, UserError
from tests.tiny import environment, smol

TEACHING = ["because", "therefore", "example", "suppose", "theorem", "exercise", "explain", "consider"]
SELLING = ["buy", "discount", "subscribe", "cookie", "login", "shipping", "checkout", "deal"]
FILLER = [f"word{number}" for number in range(300)]


def labelled(count: int, seed: int) -> tuple[list[str], list[float]]:
    """Score s: s of 5 telling words teach, the rest sell; length is drawn apart from the score."""
    chance = random.Random(seed)
    texts, scores = [], []
    for _ in range(count):
        score = chance.randint(0, 5)
        telling = chance.sample(TEACHING, score) + chance.sample(SELLING, 5 - score)
        words = telling * 3 + chance.choices(FILLER, k=chance.randint(20, 200))
        chance.shuffle(words)
        texts.append(" ".join(words))
        scores.append(float(score))
    return texts, scores


def test_learns_what_length_cannot_tell_and_loads_equal(tmp_path: Path) -> None:
    made = train(*labelled(1500, 0), Settings(), threshold=3)
    report = made.report
    low, high = report["macro_f1_95"]
    assert low <= report["macro_f1"] <= high
    assert low > report["macro_f1_by_length_alone"] + 0.1, report
    cuts = {cut["threshold"]: cut for cut in report["thresholds"]}
    assert cuts[3.0]["f1"] > 0.8 and cuts[0.5]["kept"] > cuts[4.5]["kept"]
    made.save(tmp_path / "made")
    fresh, scores = labelled(200, 1)
    loaded = Classifier.load(tmp_path / "made")
    assert (loaded.scores(fresh) == made.scores(fresh)).all() and loaded.report == report
    assert np.corrcoef(loaded.scores(fresh), scores)[0, 1] > 0.8


def test_labels_that_mean_nothing_are_not_learned() -> None:
    texts, scores = labelled(1500, 0)
    random.Random(2).shuffle(scores)
    low, _ = train(texts, scores, Settings(), threshold=3).report["macro_f1_95"]
    assert low < 0.25


def test_the_command(tmp_path: Path) -> None:
    texts, scores = labelled(300, 0)
    path = tmp_path / "labels.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t, "score": s}) + "\n" for t, s in zip(texts, scores, strict=True))
    )
    done = subprocess.run(
        smol("classifier", path, "--output", tmp_path / "made"),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "macro-F1" in done.stdout and "keep >= 3.0" in done.stdout
    assert Classifier.load(tmp_path / "made").report["held_out"] == 30


def test_a_binary_classifier_gives_probabilities_and_the_scores_that_keep_a_share(tmp_path: Path) -> None:
    texts, scores = labelled(1000, 0)
    made = train(texts, [float(score >= 3) for score in scores], Settings(kind="binary"), threshold=1)
    assert made.report["macro_f1_95"][0] > 0.8 > made.report["macro_f1_by_length_alone"]
    assert [round(cut["kept"], 2) for cut in made.report["thresholds"]] == [0.01, 0.05, 0.1, 0.2, 0.5]
    assert len(made.report["confusion"]) == 2 and made.report["documents_per_second"] > 0
    made.save(tmp_path / "made")
    found = Classifier.load(tmp_path / "made").scores([" ".join(TEACHING), " ".join(SELLING)])
    assert 0 <= found[1] < 0.2 and 0.8 < found[0] <= 1
    with pytest.raises(UserError, match="labels of a binary classifier are 0 and 1"):
        train(texts, scores, Settings(kind="binary"), threshold=1)


def test_weights_are_on_the_disk_before_what_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    Classifier(Settings(), np.ones(3), 0.0, {}).save(tmp_path)
    files = [name for name in flushed if name != tmp_path.name]
    assert [name.split(".")[0] for name in files] == ["weights", "classifier"]
    assert Classifier.load(tmp_path).weights.tolist() == [1, 1, 1]


def test_macro_f1_is_sklearns() -> None:
    from sklearn.metrics import f1_score

    chance = np.random.default_rng(0)
    for kinds in (2, 4, 6):
        truth, guess = chance.integers(0, kinds, 50), chance.integers(0, kinds - 1, 50)
        expected = f1_score(truth, guess, average="macro", zero_division=0)
        assert macro_f1(confusion(truth, guess, 5)) == pytest.approx(expected)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot train a classifier"):
        train(["a"] * 60, [1.0] * 60, Settings(), 3)
    with pytest.raises(UserError, match="between 0 and 5, found 0 to 9"):
        train(["a"] * 60, [0.0, 9.0] * 30, Settings(), 3)
    with pytest.raises(UserError, match="holds no classifier"):
        Classifier.load(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", ": 0 labelled documents with 0 different scores cannot train"),
        ('{"text": "a", "score": 1}\n' * 60, ": 60 labelled documents with 1 different"),
        ('\n{"text": "a", "note": 1}', " line 2: no key 'score'; found: text, note"),
        ('{"score": 1}', " line 1: no key 'text'; found: score"),
        ('{"text": null, "score": 1}', " line 1: key 'text' holds a NoneType; expected text"),
        ('{"text": "a", "score": "good"}', " line 1: key 'score' holds 'good'; expected a number"),
        ('{"text": "a", "score": NaN}', " line 1: key 'score' holds nan; expected a number"),
        ("[1]", " line 1: expected one JSON object a line, found a list"),
        ("so", " line 1: not one JSON object"),
    ],
)
def test_bad_labels_are_bad_data_and_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as told:
        classifier(path, tmp_path / "made")
    assert str(told.value).startswith(f"{path}{says}"), told.value


def test_an_output_that_is_a_file_is_told_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "made").touch()
    with pytest.raises(UserError, match=r"the output .*made is a file; give a folder"):
        classifier(tmp_path / "labels.jsonl", tmp_path / "made")


def test_folds_judge_every_document_by_a_fit_that_did_not_see_it() -> None:
    """Labels that mean nothing: a fit that had seen them would know many."""
    texts, scores = labelled(300, 0)
    once, each = (train(texts, scores, Settings(), 3, folds=folds).report for folds in (1, 5))
    assert (once["documents"], once["held_out"]) == (270, 30)
    assert (each["documents"], each["held_out"]) == (300, 300)
    wide, narrow = (report["macro_f1_95"][1] - report["macro_f1_95"][0] for report in (once, each))
    assert narrow < wide and each["macro_f1_above_length_95"][0] > 0
    random.Random(2).shuffle(scores)
    shuffled = train(texts, scores, Settings(), 3, folds=5).report
    assert shuffled["macro_f1_95"][0] < 0.2 and shuffled["macro_f1_above_length_95"][0] < 0
