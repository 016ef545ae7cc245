"""The demo's chat data: the same bytes each time, rows that SFT, DPO and evaluation take, no problem in two files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_smol.post.rows import conversation, preference
from tests.post.conftest import rows_of

TOOL = Path(__file__).parent.parent.parent / "tools" / "make_demo_chat.py"
pytest.importorskip("reasoning_gym")


def make(out: Path, *arguments: str, hash_seed: str = "1") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(TOOL.parent.parent)}
    command = [sys.executable, str(TOOL), "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_row_can_be_used_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    for number, seed in enumerate("12"):
        counts = ("--conversations", "40", "--pairs", "20", "--questions", "12")
        assert make(tmp_path / str(number), *counts, hash_seed=seed).returncode == 0
    for name in ("sft.jsonl", "dpo.jsonl", "demo_answers/test.jsonl"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    told = [conversation(row) for row in rows_of(tmp_path / "0" / "sft.jsonl")]
    asked = [preference(row) for row in rows_of(tmp_path / "0" / "dpo.jsonl")]
    assert (len(told), len(asked)) == (40, 20)
    evaluated = [row["question"] for row in rows_of(tmp_path / "0" / "demo_answers" / "test.jsonl")]
    questions = [turns[0]["content"] for turns in told] + [pair.prompt[0]["content"] for pair in asked]
    assert len(evaluated) == 12 and len(set(questions + evaluated)) == 72


def test_right_is_right_and_wrong_is_wrong(tmp_path: Path) -> None:
    """Sums, worked out here and not by the package that made them."""
    make(tmp_path, "--conversations", "40", "--pairs", "40")
    told = [
        (turns[0]["content"], turns[1]["content"])
        for turns in map(conversation, rows_of(tmp_path / "sft.jsonl"))
    ]
    sums = [(question, answer) for question, answer in told if "arithmetic problem: " in question]
    assert len(sums) == 10
    for question, answer in sums:
        total = sum(
            int(term) for term in question.split(": ")[1].rstrip(" =").replace("- ", "+ -").split("+")
        )
        assert answer == f"The answer is {total}."
    for pair in map(preference, rows_of(tmp_path / "dpo.jsonl")):
        if "weekday" in pair.prompt[0]["content"]:
            assert "day." in pair.chosen and "day." not in pair.rejected


def test_a_question_has_answers_of_all_kinds_and_one_is_right(tmp_path: Path) -> None:
    make(tmp_path, "--questions", "40")
    rows = rows_of(tmp_path / "demo_answers" / "test.jsonl")
    for row in rows:
        right = row["choices"][row["answer"]].removeprefix("The answer is ").removesuffix(".")
        assert len(set(row["choices"])) == 4
        assert right.endswith("day") == ("day" in row["question"])
        assert ("i" in right and not right.endswith("day")) == ("complex" in row["question"])
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_more_than_there_are(tmp_path: Path) -> None:
    done = make(tmp_path / "out", "--conversations", "9000")
    assert done.returncode == 2 and "different problems and" in done.stderr
    assert not (tmp_path / "out").exists()
