"""Questions with constraints, and the answers that a program has seen to keep them (Smol-Constraints).

The model writes a question (as `magpie` does) or one is taken from `prompts`; one to three constraints are put after it,
and the answer stays only when it keeps every one (strict, as IFEval's prompt-level score). Smol-Constraints had Qwen2.5-72B
write question and constraints together and tag them afterwards, kept 56.3 k of 550 k rows that IFEval's checker passed,
and 36 k after 10-gram decontamination against IFEval itself: the `decontaminate` step (SmolLM2 paper, section 5.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

from pydantic import Field, model_validator

from megatron_smol.curate.chat.constraints import draw, unkept
from megatron_smol.curate.chat.given import question_of
from megatron_smol.curate.chat.magpie import TEMPLATES, Magpie
from megatron_smol.curate.chat.rows import Outcome, Row
from megatron_smol.curate.chat.sampling import Generator, Sampling
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.endpoint import chat

_SYSTEM = "You are an assistant. The user asks for a text of some kind, in one sentence, without saying how it must look."


class Constraints(Generator):
    """Rows with "instruction_id_list" and "kwargs" as IFEval has them, so that they can be checked again."""

    rows: int = Field(gt=0, description="questions to ask for")
    prompts: str | None = Field(
        None, description="questions: JSONL, parquet or hub rows with prompt, question or messages"
    )
    template: str = Field("chatml", description="of the model, when it writes the questions: chatml, llama3")
    most: int = Field(3, ge=1, le=5, description="constraints in one instruction")
    sampling: Sampling = Sampling(temperature=0.8, top_p=1.0, max_tokens=1024)

    @model_validator(mode="after")
    def _known_template(self) -> Constraints:
        if self.template not in TEMPLATES:
            raise ValueError(f"template '{self.template}' is not known; allowed: {', '.join(TEMPLATES)}")
        return self

    def outcomes(self, tools: Tools) -> Iterator[Outcome]:
        return tools.each(self.model, lambda item: self._row(tools, *item), self._questions())

    def _questions(self) -> Iterator[tuple[int, Any]]:
        from megatron_smol.post.rows import read_rows

        if self.prompts is None:
            yield from ((number, None) for number in range(self.rows))
            return
        yield from enumerate(row for _, row in islice(read_rows(self.prompts), self.rows))

    def _row(self, tools: Tools, number: int, given: Any) -> Outcome:
        row: Row = {"id": f"{tools.part}-{number}", "source": tools.part}
        asked = draw(Random(tools.chance("constraints", number)), self.most)
        row |= {
            "instruction_id_list": [name for name, _ in asked],
            "kwargs": [arguments for _, arguments in asked],
        }
        try:
            question = self._written(tools, number) if self.prompts is None else question_of(given)
            words = " ".join(_words_of(asked))
            row["messages"] = [{"role": "user", "content": f"{question}\n\n{words}"}]
            made = tools.say(self.model, chat(row["messages"], **self.sampling.payload(tools.chance(number))))
        except NoAnswer as error:
            return Outcome(row, str(error))
        row["messages"] = [*row["messages"], {"role": "assistant", "content": made}]
        broken = unkept(made, asked)
        return Outcome(row, f"constraint not kept: {broken[0]}" if broken else None)

    def _written(self, tools: Tools, number: int) -> str:
        asker = Magpie.model_validate(
            {"model": self.model, "rows": 1, "template": self.template, "sampling": self.sampling}
        )
        seed = tools.chance("question", number)
        return asker.said(tools, [{"role": "system", "content": _SYSTEM}], "user", seed)


def _words_of(asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    from megatron_smol.curate.chat.constraints import CONSTRAINTS

    return [CONSTRAINTS[name].words(arguments) for name, arguments in asked]
