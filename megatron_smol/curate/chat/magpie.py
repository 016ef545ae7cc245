"""Conversations out of a chat model alone (Magpie): given its template up to where a user speaks, it writes the user.

    <|im_start|>system ... <|im_end|> <|im_start|>user    -> the model writes a question, then answers it, and so on

MagPie-Ultra, the largest part of SmolTalk: Llama-3.1-405B-Instruct, 3 turns, temperature 0.8, top_p 1, 1,024 tokens, system
prompts by category in the shares below (huggingface/smollm, text/data/smoltalk/magpie_ultra_v1). There the tokens that
begin Markdown were held back at the first place of a text; here a question that begins so is dropped, which is the same
distribution. The words of the system prompts are our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_smol.curate.chat.rows import Outcome, Row
from megatron_smol.curate.chat.sampling import Generator, Sampling
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.endpoint import completion

SHARES = {
    "reasoning": 0.125, "coding": 0.125, "math": 0.125, "data analysis": 0.125,
    "editing": 0.1, "role-play": 0.1, "creative writing": 0.1,
    "information seeking": 0.05, "planning": 0.05, "advice": 0.05, "brainstorming": 0.05,
}  # fmt: skip
_SUBJECTS = {
    "reasoning": "think problems through logically, one step after the other, and check each conclusion",
    "coding": "write, explain and correct programs in many programming languages",
    "math": "solve mathematical problems of every level and explain each step",
    "data analysis": "analyse data: statistics, tables, charts and what may be concluded from them",
    "editing": "edit and improve texts that they give you, and say what you changed",
    "role-play": "take on a character that they describe and speak as it would",
    "creative writing": "write stories, poems, scripts and other texts of imagination",
    "information seeking": "find facts and explanations on any subject, exactly and in few words",
    "planning": "plan projects, journeys and days, with steps, times and alternatives",
    "advice": "decide in personal and professional matters, with regard to their situation",
    "brainstorming": "collect many and varied ideas on a subject",
}
_SYSTEM = "You are an assistant that helps people to {}. The user asks one clear question or task of this kind at a time."
# What stands before and after a turn.
TEMPLATES = {
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>\n"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
}
_MARKDOWN = ("#", "*", "```", "- ", "|", ">")


class Magpie(Generator):
    """Multi-turn conversations, all of it written by the model."""

    rows: int = Field(gt=0, description="conversations to ask for")
    turns: int = Field(3, ge=1, description="questions, each with an answer")
    template: Literal["chatml", "llama3"] = Field("chatml", description="of the model")
    categories: dict[str, float] = Field(
        default_factory=lambda: dict(SHARES), description="shares of system prompts; they add up to 1"
    )
    systems: dict[str, str] = Field(
        default_factory=dict, description="system prompts of categories of your own, or other words"
    )
    keep_system: bool = Field(False, description="the system prompt stays in the row")
    sampling: Sampling = Sampling(temperature=0.8, top_p=1.0, max_tokens=1024)

    @field_validator("categories")
    @classmethod
    def _add_up(cls, value: dict[str, float]) -> dict[str, float]:
        total = math.fsum(value.values())
        if abs(total - 1) > 1e-6 or min(value.values(), default=0) <= 0:
            raise ValueError(f"shares are above 0 and add up to 1; these add up to {total:g}")
        return value

    def system(self, category: str) -> str:
        if category in self.systems:
            return self.systems[category]
        return _SYSTEM.format(_SUBJECTS.get(category, f"with {category}"))

    def category(self, number: int) -> str:
        """Of row `number`. Each stretch of rows has the shares almost exactly (multiples of the golden ratio)."""
        place, total = (number + 0.5) * 0.6180339887498949 % 1.0, 0.0
        for name, share in self.categories.items():
            total += share
            if place < total:
                return name
        return name

    def outcomes(self, tools: Tools) -> Iterator[Outcome]:
        return tools.each(self.model, lambda number: self._conversation(tools, number), range(self.rows))

    def _conversation(self, tools: Tools, number: int) -> Outcome:
        category = self.category(number)
        turns = [{"role": "system", "content": self.system(category)}]
        row: Row = {"id": f"{tools.part}-{number}", "source": tools.part, "category": category}
        try:
            for turn in range(2 * self.turns):
                role = ("user", "assistant")[turn % 2]
                text = self.said(tools, turns, role, tools.chance(number, turn))
                turns.append({"role": role, "content": text})
        except NoAnswer as error:
            return Outcome(row | {"messages": turns}, str(error))
        return Outcome(row | {"messages": turns if self.keep_system else turns[1:]})

    def said(self, tools: Tools, turns: list[dict[str, str]], role: str, seed: int) -> str:
        """The next turn, by `role`."""
        before, after = TEMPLATES[self.template]
        spoken = "".join(before.format(role=turn["role"]) + turn["content"] + after for turn in turns)
        settings: dict[str, Any] = self.sampling.payload(seed) | {"stop": [after.strip()]}
        text = tools.say(self.model, completion(spoken + before.format(role=role), **settings))
        if role == "user" and text.startswith(_MARKDOWN):
            raise NoAnswer("question begins with Markdown")
        return text
