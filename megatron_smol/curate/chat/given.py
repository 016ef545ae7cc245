"""Rows that lie there: the public sets of SmolTalk's mix, or SmolTalk itself for the reduction to smol-smoltalk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from pydantic import Field, model_validator

from megatron_smol.curate.chat.rows import Outcome, Row
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.section import Section
from megatron_smol.post.rows import Message, NotJson, Preference, RowError, preference, read_rows


class Given(Section):
    """Rows with "messages" (or prompt, chosen, rejected), or two fields that become a turn each."""

    data: str = Field(description="JSONL (plain, .gz, .zst), parquet, or hub OWNER/NAME:CONFIG:SPLIT")
    rows: int | None = Field(None, gt=0, description="rows to read at most")
    user: str | None = Field(None, description="field of the user's turn, in rows without messages")
    assistant: str | None = Field(None, description="field of the assistant's turn")

    @model_validator(mode="after")
    def _both(self) -> Given:
        if (self.user is None) != (self.assistant is None):
            raise ValueError("give `user` and `assistant` together: the fields that become the two turns")
        return self

    def models(self) -> list[str]:
        return []

    def outcomes(self, tools: Tools) -> Iterator[Outcome]:
        for number, (_, given) in enumerate(islice(read_rows(self.data), self.rows)):
            row: Row = {"id": f"{tools.part}-{number}", "source": tools.part}
            if not isinstance(given, dict):
                yield Outcome(row, given.reason if isinstance(given, NotJson) else "not a JSON object")
                continue
            try:
                yield Outcome(row | given | {"id": row["id"]} | self._turns(given))
            except RowError as error:
                yield Outcome(row | given, str(error))

    def _turns(self, given: dict[str, Any]) -> Row:
        """What is not yet as the steps want it: fields to turns, answers alone to whole conversations."""
        if self.user is not None and self.assistant is not None:
            pair = (("user", self.user), ("assistant", self.assistant))
            return {"messages": [{"role": role, "content": given.get(name)} for role, name in pair]}
        return as_pair(preference(given)) if "chosen" in given else {}


def as_pair(pair: Preference) -> Row:
    """As ultrafeedback_binarized has it: the last question, and both conversations whole."""
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {"prompt": pair.prompt[-1]["content"]} | {
        name: [*pair.prompt, {"role": "assistant", "content": text}] for name, text in answers.items()
    }


def prompt_of(row: Any) -> list[Message]:
    """What is to be answered: the turns up to the last question. Raises NoAnswer for a row without one."""
    if isinstance(row, dict):
        for name in ("prompt", "question", "instruction"):
            if isinstance(row.get(name), str) and row[name].strip():
                return [{"role": "user", "content": row[name].strip()}]
        turns = row.get("messages") or row.get("prompt") or []
        while isinstance(turns, list) and turns and _role(turns[-1]) == "assistant":
            turns = turns[:-1]
        if isinstance(turns, list) and turns and _role(turns[-1]) == "user":
            return turns
    raise NoAnswer(row.reason if isinstance(row, NotJson) else "no question in the row")


def question_of(row: Any) -> str:
    """The last question of a row, as text."""
    return prompt_of(row)[-1]["content"]


def _role(turn: Any) -> str | None:
    content = turn.get("content") if isinstance(turn, dict) else None
    return turn.get("role") if isinstance(content, str) and content.strip() else None
