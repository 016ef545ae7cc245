"""What a part keeps: each step takes rows and gives them back, with a reason for those that it drops."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import tee
from typing import Any, ClassVar

from pydantic import Field, model_validator

from megatron_smol.curate.chat.judge import Asked, asked_score, number_of
from megatron_smol.curate.chat.rows import Outcome, Row, text_of, turns_of
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.section import Section
from megatron_smol.curate.steps import Regex


class Step(Section):
    title: ClassVar[str]

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        raise NotImplementedError

    def models(self) -> list[str]:
        """Names that must be among `models`."""
        return []


class Judge(Step):
    """A score from a model, or one that the rows have; it stays in the row under `field`."""

    title: ClassVar = "score"
    ask: Asked = Field(
        description="quality or difficulty of the questions (1 to 5), reward of the answer (1 to 10)"
    )
    model: str | None = Field(None, description="name of one of `models`; absent: only the rows' own field")
    field: str | None = Field(None, description="of the score in the row; default: what is asked")
    at_least: float | None = None
    at_most: float | None = None

    def models(self) -> list[str]:
        return [self.model] if self.model else []

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        if self.model is None:
            return (self._judged(row, tools) for row in rows)
        return tools.each(self.model, lambda row: self._judged(row, tools), rows)

    def _judged(self, row: Row, tools: Tools) -> Outcome:
        name = self.field or self.ask
        try:
            if row.get(name) is not None:
                score = number_of(row[name])
            elif self.model is not None:
                score = asked_score(tools, self.model, self.ask, turns_of(row))
            else:
                raise NoAnswer(f"no '{name}' in the row")
        except NoAnswer as error:
            return Outcome(row, str(error))
        row = row | {name: score}
        if self.at_least is not None and score < self.at_least:
            return Outcome(row, f"{name} below {self.at_least:g}")
        if self.at_most is not None and score > self.at_most:
            return Outcome(row, f"{name} above {self.at_most:g}")
        return Outcome(row)


class Only(Step):
    """Rows by the value of a field, such as SmolTalk's `source`."""

    title: ClassVar = "field"
    field: str
    values: tuple[Any, ...]
    drop: bool = Field(False, description="these values go, the others stay")

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        for row in rows:
            value = row.get(self.field)
            found = value in self.values
            yield Outcome(row, None if found != self.drop else f"{self.field} is {value}")


class Turns(Step):
    """By the number of the user's turns."""

    title: ClassVar = "turns"
    at_least: int = Field(1, ge=1)
    at_most: int | None = Field(None, ge=1)
    cut: bool = Field(
        False, description="longer conversations end after `at_most` answers, in place of being dropped"
    )

    @model_validator(mode="after")
    def _cuts_somewhere(self) -> Turns:
        if self.cut and self.at_most is None:
            raise ValueError("cut needs `at_most`")
        return self

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        for row in rows:
            asked = sum(turn["role"] == "user" for turn in turns_of(row))
            if asked < self.at_least:
                yield Outcome(row, f"fewer than {self.at_least} turns")
            elif self.at_most is None or asked <= self.at_most:
                yield Outcome(row)
            elif self.cut and "chosen" not in row:
                yield Outcome(row | {"messages": self._first(row["messages"])})
            else:
                yield Outcome(row, f"more than {self.at_most} turns")

    def _first(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """Up to the last answer before the question that is one too many."""
        questions = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        assert self.at_most is not None
        end = questions[self.at_most]
        return turns[:end]


class Length(Step):
    """By the characters of all turns together."""

    title: ClassVar = "length"
    at_least: int = Field(0, ge=0, description="characters")
    at_most: int | None = Field(None, gt=0, description="characters")

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        for row in rows:
            characters = len(text_of(row))
            if characters < self.at_least:
                yield Outcome(row, f"shorter than {self.at_least:,} characters")
            elif self.at_most is not None and characters > self.at_most:
                yield Outcome(row, f"longer than {self.at_most:,} characters")
            else:
                yield Outcome(row)


class Match(Step):
    """Rows whose text has a regular expression are dropped (or, with `keep`, the others are)."""

    title: ClassVar = "match"
    pattern: Regex
    keep: bool = False

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        pattern = re.compile(self.pattern)
        for row in rows:
            found = pattern.search(text_of(row)) is not None
            yield Outcome(row, None if found == self.keep else "matches" if found else "does not match")


class Exact(Step):
    """Rows that say what one before them says, up to white space."""

    title: ClassVar = "exact duplicates"

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        seen: set[bytes] = set()
        for row in rows:
            key = hashlib.sha256(" ".join(text_of(row).split()).encode()).digest()[:16]
            yield Outcome(row, "exact duplicate" if key in seen else None)
            seen.add(key)


class Semantic(Step):
    """Rows whose first question (or all text) means what one before them means."""

    title: ClassVar = "semantic duplicates"
    threshold: float = Field(0.9, gt=0, le=1, description="cosine from which two are the same")
    encoder: str | None = Field(
        None,
        description="Hugging Face model or folder, such as Alibaba-NLP/gte-large-en-v1.5; absent: hashed words",
    )
    all_text: bool = Field(False, description="compare whole conversations, not first questions")

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        from megatron_smol.curate.chat.semantic import near_equal

        rows, compared = tee(rows)
        said: Callable[[Row], str] = text_of if self.all_text else _first_question
        for drop in near_equal(map(said, compared), self.encoder, self.threshold):
            yield Outcome(next(rows), f"cosine of {self.threshold:g} or more" if drop else None)


def _first_question(row: Row) -> str:
    return next((turn["content"] for turn in turns_of(row) if turn["role"] == "user"), "")


class Decontaminate(Step):
    """Rows that hold a benchmark item; Smol-Constraints: 10-grams of IFEval's prompts, and any hit counts."""

    title: ClassVar = "contamination"
    files: tuple[str, ...] = Field(min_length=1)
    fields: tuple[str, ...] = ("prompt",)
    ngram: int = Field(10, ge=3)
    ratio: float = Field(
        0.0, ge=0, le=1, description="longest common subsequence, of the item; 0: a hit is enough"
    )

    def run(self, rows: Iterator[Row], tools: Tools) -> Iterator[Outcome]:
        from megatron_smol.curate.contamination import load_index

        index = load_index(self.files, self.fields, self.ngram)
        for row in rows:
            if found := index.find(text_of(row), self.ratio):
                yield Outcome(row | {"contamination": found}, found["benchmark"])
            else:
                yield Outcome(row)
