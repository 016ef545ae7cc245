"""Tasks on a text: rewriting it in another tone (Smol-Rewrite) and summarising it (Smol-Summarization).

Both sets had Qwen2.5-72B-Instruct answer a system prompt and a text as the user's turn; the prompts stay in the rows, so
that the model learns to follow them. Rewriting: e-mails, LinkedIn posts and tweets made by a model, temperature 0.2, top_p
0.95. Summaries: CNN/DailyMail and the e-mails, temperature 0.2, top_p 0.9, 256 tokens (SmolLM2 paper, section 5.1;
huggingface/smollm, text/data/smoltalk). The words of the prompts are our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator, model_validator

from megatron_smol.curate.chat.rows import Outcome, Row
from megatron_smol.curate.chat.sampling import Generator, Sampling
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.endpoint import chat

_KINDS = ("an e-mail", "a LinkedIn post", "a tweet")
_WRITE = (
    "Write {kind} as a real person might: invent who writes, to whom and why, with names and details. Text number {number}. "
    "Give the text alone, without remarks."
)

_REWRITE = {
    "concise": "Rewrite the user's text so that it says the same in fewer words. Answer with the new text alone.",
    "friendly": "Rewrite the user's text so that it is warmer and easier to approach, with the same points. "
    "Answer with the new text alone.",
    "professional": "Rewrite the user's text so that it is formal and professional, with the same content. "
    "Answer with the new text alone.",
}
_SUMMARIZE = {
    "one sentence": "Say the main point of the user's text in one short sentence, with names, dates and places where "
    "they matter. Answer with that sentence alone.",
    "three sentences": "Summarise the user's text objectively in at most three sentences, without speaking of 'I', 'you' "
    "or 'the text'. Answer with the summary alone.",
}


class TextTask(Generator):
    """A system prompt, a text, and what the model makes of it."""

    inputs: tuple[str, ...] = Field((), description="rows with the texts: JSONL, parquet, hub names")
    text_key: str = Field("text", description="field of the text in `inputs`")
    write: int = Field(0, ge=0, description="texts that the model writes itself, in place of `inputs`")
    kinds: tuple[str, ...] = Field(_KINDS, description="what it writes, in turn")
    writing: Sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=512)
    rows: int | None = Field(None, gt=0, description="texts to take at most")
    prompts: dict[str, str]
    sampling: Sampling

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_texts(self) -> TextTask:
        if bool(self.inputs) == bool(self.write):
            raise ValueError("give either `inputs` (files with texts) or `write` (how many the model writes)")
        if not self.prompts:
            raise ValueError("prompts are empty; give at least one, as `name: words`")
        return self

    def outcomes(self, tools: Tools) -> Iterator[Outcome]:
        return tools.each(self.model, lambda item: self._row(tools, *item), self._texts())

    def _texts(self) -> Iterator[tuple[int, Any]]:
        """Each number with its text, or with the kind of text to write."""
        from itertools import islice

        from megatron_smol.post.rows import read_rows

        if self.write:
            yield from ((number, None) for number in range(self.write))
            return
        rows = (row for name in self.inputs for _, row in read_rows(name))
        yield from enumerate(islice(rows, self.rows))

    def _row(self, tools: Tools, number: int, given: Any) -> Outcome:
        names = list(self.prompts)
        task = names[number % len(names)]
        row: Row = {"id": f"{tools.part}-{number}", "source": tools.part, "category": task}
        try:
            text = self._written(tools, number) if self.write else _text(given, self.text_key)
            messages = [
                {"role": "system", "content": self.prompts[task]},
                {"role": "user", "content": text},
            ]
            row["messages"] = messages
            made = tools.say(self.model, chat(messages, **self.sampling.payload(tools.chance(number))))
        except NoAnswer as error:
            return Outcome(row, str(error))
        return Outcome(row | {"messages": [*messages, {"role": "assistant", "content": made}]})

    def _written(self, tools: Tools, number: int) -> str:
        # One kind for each round of prompts, so that every prompt meets every kind.
        kind = self.kinds[number // len(self.prompts) % len(self.kinds)]
        asked = [{"role": "user", "content": _WRITE.format(kind=kind, number=number + 1)}]
        return tools.say(self.model, chat(asked, **self.writing.payload(tools.chance("text", number))))


def _text(row: Any, key: str) -> str:
    text = row.get(key) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise NoAnswer(f"no text in '{key}'")
    return text.strip()


class Rewrite(TextTask):
    """In another tone, with the same meaning."""

    prompts: dict[str, str] = Field(
        default_factory=lambda: dict(_REWRITE), description="system prompts, in turn"
    )
    sampling: Sampling = Sampling(temperature=0.2, top_p=0.95, max_tokens=1024)


class Summarize(TextTask):
    """The main points, in few sentences."""

    prompts: dict[str, str] = Field(
        default_factory=lambda: dict(_SUMMARIZE), description="system prompts, in turn"
    )
    sampling: Sampling = Sampling(temperature=0.2, top_p=0.9, max_tokens=256)
