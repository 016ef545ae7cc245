"""Documents get a language model's scores over HTTP; what goes wrong is counted, and nothing is paid twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document

from megatron_smol.commands.annotate import annotate as command
from megatron_smol.curate.annotate import SCALES, request_of, sampled, score_in
from megatron_smol.errors import DataError, UserError
from tests.curate.language_server import Reply, serving

COUNT = 12


class Teacher:
    """Gives document n the score n mod 6; the first requests for some documents fail, two never get a score."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, path: str, body: dict[str, Any]) -> Reply:
        found = re.search(r"document (\d+)\.", body["messages"][0]["content"])
        assert found and path == "chat/completions" and body["temperature"] == 0
        number = int(found[1])
        first = number not in self.asked
        self.asked.append(number)
        if first and number in (0, 1, 2, 3):
            return (
                Reply(status=429, headers={"Retry-After": "0"}),
                Reply(status=500),
                Reply(hang=True),
                Reply(body=b"<html>busy</html>"),
            )[number]
        if number == 4:
            return Reply(status=400)
        if number == 5:
            return Reply("I would rather not say.")
        return Reply(f"It teaches. Score: 9 would be too much.\nScore: {number % 6}")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    rows = [
        {"text": f"This is document {n}. It has {{braces}}.", "id": f"d{n}", "url": f"u{n}"}
        for n in range(COUNT)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(documents: Path, output: Path, url: str, **more: Any) -> None:
    command([str(documents)], output, model="teacher", endpoint=url, timeout=3.0, retries=3, retry_pause=0.01,
            price_in=10.0, price_out=30.0, concurrency=3, **more)  # fmt: skip


def test_scores_failures_and_what_it_cost(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, output = Teacher(), tmp_path / "labels.jsonl"
    with serving(teacher) as server:
        run(documents, output, server.url)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"d{n}" for n in range(COUNT) if n not in (4, 5)]
        assert all(
            row["score"] == int(row["id"][1:]) % 6 and row["url"] and "document" in row["text"]
            for row in rows
        )
        told = capsys.readouterr().out
        assert "10 documents scored: 0: 2, 1: 2, 2: 2, 3: 2, 4: 1, 5: 1" in told
        assert "status 400 1" in told and "no score in the answer 1" in told
        for why in ("status 429", "status 500", "timed out", "no answer in the response"):
            assert why in told.split("tried again: ")[1].splitlines()[0]
        before, content = list(teacher.asked), output.read_bytes()
        output.unlink()
        run(documents, output, server.url)
    assert teacher.asked[len(before) :] == [4], (
        "answers are on the disk; only the request without one is made again"
    )
    assert output.read_bytes() == content
    cost = re.search(r"([\d,]+) tokens in, ([\d,]+) out, ([\d.]+) dollars", told)
    assert cost
    tokens_in, tokens_out = (int(cost[n].replace(",", "")) for n in (1, 2))
    assert tokens_in and float(cost[3]) == pytest.approx((tokens_in * 10 + tokens_out * 30) / 1e6)


def test_a_run_that_breaks_off_keeps_its_answers(documents: Path, tmp_path: Path) -> None:
    teacher, output = Teacher(), tmp_path / "labels.jsonl"
    teacher.asked = list(range(4))
    broken = {"now": True}

    def locked(path: str, body: dict[str, Any]) -> Reply:
        reply = teacher(path, body)
        return Reply(status=401) if broken["now"] and teacher.asked[-1] == 9 else reply

    with serving(locked) as server:
        with pytest.raises(UserError, match="refuses the key"):
            run(documents, output, server.url)
        assert not output.exists() and not list(tmp_path.glob("*.partial"))
        answered = {n for n in teacher.asked[4:] if n not in (4, 9)}
        assert answered
        broken["now"], seen = False, len(teacher.asked)
        run(documents, output, server.url)
    assert not answered & set(teacher.asked[seen:])
    assert len(output.read_text().splitlines()) == COUNT - 2


def test_nothing_is_written_when_nothing_got_a_score(documents: Path, tmp_path: Path) -> None:
    with (
        serving(lambda path, body: "no idea") as server,
        pytest.raises(DataError, match="no score in the answer 12"),
    ):
        run(documents, tmp_path / "labels.jsonl", server.url)
    assert not (tmp_path / "labels.jsonl").exists()


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Good.\nScore: 4", 4),
        ("**Score:** 3", 3),
        ("score 2. On reflection: Score: 5", 5),
        ("Educational score: 0/5", 0),
        ("Score: 4.0", 4),
        ("Score: 7", None),
        ("Score: 2.5", None),
        ("four", None),
        ("3", 3),
        ("**4**\n", 4),
        ("2/5\nIt explains", 2),
        ("1. it says something", None),
        ("3rd place", None),
        ("It has 3 parts", None),
    ],
)
def test_the_score_in_an_answer(answer: str, score: int | None) -> None:
    assert score_in(answer, 5) == score


def test_questions_name_every_point_and_show_so_much_of_the_text() -> None:
    document = Document(text="fn main() {}" + "x" * 500, id="1", metadata={"language": "Rust"})
    for scale in SCALES.values():
        prompt = request_of(document, scale, 300).payload["messages"][0]["content"]
        assert all(point in prompt for point in scale.points) and f"from 0 to {len(scale.points)}." in prompt
        assert document.text[:300] in prompt and document.text[:301] not in prompt and "first 300" in prompt
        alone = request_of(document, scale, 300, reasons=False).payload
        assert len(alone["messages"]) == 1
        assert "no reasons" in alone["messages"][0]["content"] and alone["max_tokens"] < 20
    assert "this Rust file" in request_of(document, SCALES["code"], 300).payload["messages"][0]["content"]


def test_documents_are_drawn_evenly_and_always_the_same() -> None:
    def drawn(seed: int) -> list[str]:
        return [d.id for d in sampled((Document(text="x", id=str(i)) for i in range(100)), 20, seed)]

    assert (
        drawn(0) == drawn(0) != drawn(1)
        and drawn(0) == sorted(drawn(0), key=int)
        and len(set(drawn(0))) == 20
    )
    late = sum(int(i) >= 50 for seed in range(200) for i in drawn(seed))
    assert abs(late / 4000 - 0.5) < 0.04


def test_an_unknown_scale(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed: edu, maths-page, maths, code"):
        command(
            [str(documents)], tmp_path / "a", model="m", scale="physics", endpoint="http://localhost:1/v1"
        )


def test_an_answer_is_made_to_begin(documents: Path, tmp_path: Path) -> None:
    """The server is told to go on from the words; what it adds is read after them."""
    with serving(
        lambda _, body: " 4" if body["messages"][-1]["content"] == "Score:" else "I like it"
    ) as server:
        run(documents, tmp_path / "a.jsonl", server.url, begin="Score:", reasons=False)
    assert all(
        body["continue_final_message"] and not body["add_generation_prompt"] for _, body in server.seen
    )
    assert {json.loads(line)["score"] for line in (tmp_path / "a.jsonl").read_text().splitlines()} == {4}
