"""Benchmark items are found when they are there, and other texts about the same things are left alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from datatrove.data import Document

from megatron_smol.curate.contamination import Decontaminate, load_index, words_of
from megatron_smol.curate.kept import FewDropped
from megatron_smol.errors import UserError

NAMES = ["Mia", "Tom", "Ada", "Ben", "Zoe"]
THINGS = ["apples", "marbles", "stamps", "books", "coins"]


def question(chance: random.Random) -> str:
    """A word problem; they resemble each other, as GSM8K's do."""
    a, b = chance.sample(NAMES, 2)
    thing, n, m, k = chance.choice(THINGS), *(chance.randint(2, 999) for _ in range(3))
    return (
        f"{a} has {n} {thing} and gives {m} of them to {b}. The next day {a} finds {k} more {thing} in a box. "
        f"How many {thing} does {a} have now?"
    )


@pytest.fixture
def items(tmp_path: Path) -> tuple[Path, list[str]]:
    chance = random.Random(0)
    questions = [question(chance) for _ in range(100)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": text, "answer": "7"}) + "\n" for text in questions))
    return path, questions


def filter_of(path: Path, tmp_path: Path, **options: object) -> Decontaminate:
    settings = {"fields": ("question",), "ngram": 13, "ratio": 0.6} | options
    return Decontaminate((str(path),), few=FewDropped(tmp_path / "few"), **settings)  # type: ignore[arg-type]


def test_every_planted_leak_is_found_and_named(items: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, questions = items
    filtering, chance = filter_of(path, tmp_path), random.Random(1)
    around = "Some prose about other things, long enough to hide a question in it. " * 20
    for number, text in enumerate(questions, 1):
        shown = text.upper() if number % 3 == 0 else text.replace(". ", ".\n\n")
        cut = chance.randint(0, len(around))
        document = Document(text=around[:cut] + " " + shown + " " + around[cut:], id="d")
        assert filtering.filter(document) == (False, "test.jsonl"), text
        assert document.metadata["contamination"]["item"] == number
        assert document.metadata["contamination"]["ratio"] >= 0.6


def test_other_questions_of_the_same_kind_pass(items: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Numbers are not folded: the same sentence with other numbers is another question."""
    path, questions = items
    filtering, chance = filter_of(path, tmp_path), random.Random(7)
    others = [text for text in (question(chance) for _ in range(500)) if text not in questions]
    flagged = sum(filtering.filter(Document(text=text, id="d")) is not True for text in others)
    assert flagged / len(others) < 0.03, flagged


def test_an_ngram_alone_is_not_enough(items: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, questions = items
    quoted = " ".join(questions[0].split()[:14])
    assert filter_of(path, tmp_path).filter(Document(text=f"{quoted} ... and then a story", id="d")) is True
    assert filter_of(path, tmp_path, ratio=0.3).filter(Document(text=quoted, id="d")) is not True


def test_items_shorter_than_an_ngram_are_found_whole(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"question": "Which planet is nearest the sun?"}\n')
    filtering = filter_of(path, tmp_path)
    assert (
        filtering.filter(Document(text="Quiz: which planet is nearest the Sun? Mercury", id="d")) is not True
    )
    assert filtering.filter(Document(text="The planet nearest the sun is Mercury", id="d")) is True


def test_an_index_that_could_find_nothing_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for files, message in (
        ((), "hold no item"),
        ((str(empty),), "hold no item"),
        ((str(tmp_path / "no.jsonl"),), "no benchmark file at"),
    ):
        with pytest.raises(UserError, match=message):
            load_index(files, ("question",), 13)
    empty.write_text('{"q": "five words are in here"}\n')
    with pytest.raises(UserError, match="line 1: no field 'question'; found: q"):
        load_index((str(empty),), ("question",), 13)


def test_words() -> None:
    assert words_of("It's 3.5 km, NaÏve_x") == ["it", "s", "3", "5", "km", "naïve", "x"]
