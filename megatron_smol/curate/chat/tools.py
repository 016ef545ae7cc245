"""What generators and steps work with: the models of the chat data file, the part's name, the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from megatron_smol.curate.chat.rows import chance
from megatron_smol.curate.endpoint import Answer, Endpoint, Failed, Request

Given = TypeVar("Given")
Made = TypeVar("Made")


class NoAnswer(Exception):
    """A request that failed, or an answer of no use: the reason for which its row is dropped."""


@dataclass(frozen=True)
class Tools:
    """part: whose rows are made; seed: of the chat data file."""

    models: Mapping[str, Endpoint]
    part: str
    seed: int

    def chance(self, *of: object) -> int:
        """A number from 0 to 2^31 - 1 of this part's own, the same in every run."""
        return chance(self.seed, self.part, *of)

    def say(self, model: str, request: Request) -> str:
        """The text of the answer, stripped. Raises NoAnswer; a text that was cut off counts as none."""
        answer = self.models[model].ask(request)
        if isinstance(answer, Failed):
            raise NoAnswer(f"request failed: {answer.reason}")
        return whole(answer)

    def each(self, model: str, work: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """`work` on each item, as many at once as the model takes; results in order."""
        return self.models[model].map(work, items)


def whole(answer: Answer) -> str:
    if answer.finish_reason == "length":
        raise NoAnswer("answer cut off at max_tokens")
    if not (text := answer.text.strip()):
        raise NoAnswer("empty answer")
    return text
