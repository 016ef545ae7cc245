"""Preferences from k answers to each prompt: the best one and a worse one, with the margin between them.

UltraFeedback: 4 answers from different models, each rated by GPT-4; ultrafeedback_binarized, on which SmolLM2's DPO ran,
took the best as chosen and one of the others at random as rejected. Where the right answer is known (mathematics,
constraints), a check takes the place of the rating. Prompts whose answers are all equally good teach nothing: dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_smol.curate.chat.given import as_pair, prompt_of
from megatron_smol.curate.chat.judge import asked_score, kept_share, same_answer
from megatron_smol.curate.chat.rows import Outcome, Row
from megatron_smol.curate.chat.sampling import Sampling
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.endpoint import chat
from megatron_smol.curate.section import Section
from megatron_smol.post.rows import Message, Preference, read_rows


class Scored(NamedTuple):
    score: float
    model: str
    text: str


class Preferences(Section):
    """Rows as ultrafeedback_binarized has them: prompt, chosen, rejected (conversations), their scores, margin."""

    prompts: str = Field(description="rows with prompt, question or messages: JSONL, parquet, hub")
    rows: int | None = Field(None, gt=0, description="prompts to read at most")
    writers: tuple[str, ...] = Field(min_length=1, description="names of `models`; they answer in turn")
    completions: int = Field(4, ge=2, description="answers a prompt")
    judge: str | None = Field(None, description="name of the model that scores from 1 to 10")
    verify: Literal["answer", "constraints"] | None = Field(
        None, description="check in place of the judge: the final answer, or instruction_id_list and kwargs"
    )
    answer_key: str = Field("answer", description="field of the right answer, for verify: answer")
    rejected: Literal["random", "worst"] = Field("random", description="which of the worse answers")
    min_margin: float = Field(
        0.0, ge=0, description="least difference of the two scores; equal ones never count"
    )
    sampling: Sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=1024)

    @model_validator(mode="after")
    def _scores(self) -> Preferences:
        if (self.judge is None) == (self.verify is None):
            raise ValueError("give either `judge` (a model that scores) or `verify` (answer or constraints)")
        return self

    def models(self) -> list[str]:
        return [*self.writers, *([self.judge] if self.judge else [])]

    def outcomes(self, tools: Tools) -> Iterator[Outcome]:
        prompts = enumerate(row for _, row in islice(read_rows(self.prompts), self.rows))
        return tools.each(self.writers[0], lambda item: self._row(tools, *item), prompts)

    def _row(self, tools: Tools, number: int, given: Any) -> Outcome:
        row: Row = {"id": f"{tools.part}-{number}", "source": tools.part}
        try:
            prompt = prompt_of(given)
            row["messages"] = prompt  # until there are answers: what the card shows of a dropped row
            best, worse = self._chosen(tools, number, self._scored(tools, number, prompt, given))
        except NoAnswer as error:
            return Outcome(row, str(error))
        del row["messages"]
        return Outcome(
            row
            | as_pair(Preference(prompt, best.text, worse.text))
            | {"score_chosen": best.score, "score_rejected": worse.score, "margin": best.score - worse.score}
            | {"model_chosen": best.model, "model_rejected": worse.model}
        )

    def _scored(
        self, tools: Tools, number: int, prompt: list[Message], given: dict[str, Any]
    ) -> list[Scored]:
        """The answers that came, each once. Raises NoAnswer with why, when fewer than two did."""
        scored: dict[str, Scored] = {}
        problem = "all answers are the same"
        for place in range(self.completions):
            model = self.writers[place % len(self.writers)]
            try:
                text = tools.say(model, chat(prompt, **self.sampling.payload(tools.chance(number, place))))
                if text not in scored:
                    scored[text] = Scored(self._score(tools, prompt, text, given), model, text)
            except NoAnswer as error:
                problem = str(error)
        if len(scored) < 2:
            raise NoAnswer(problem)
        return list(scored.values())

    def _score(self, tools: Tools, prompt: list[Message], text: str, given: dict[str, Any]) -> float:
        if self.judge is not None:
            return asked_score(tools, self.judge, "reward", [*prompt, {"role": "assistant", "content": text}])
        if self.verify == "constraints":
            return kept_share(text, given)
        if not isinstance(right := given.get(self.answer_key), str | int | float):
            raise NoAnswer(f"no right answer in '{self.answer_key}'")
        return float(same_answer(text, str(right)))

    def _chosen(self, tools: Tools, number: int, scored: list[Scored]) -> tuple[Scored, Scored]:
        """The first of the best, and a worse one."""
        best = max(scored, key=lambda answer: answer.score)
        worse = [
            answer
            for answer in scored
            if answer.score < best.score and best.score - answer.score >= self.min_margin
        ]
        if not worse:
            raise NoAnswer("no answer is better than another")
        if self.rejected == "worst":
            return best, min(worse, key=lambda answer: answer.score)
        return best, worse[tools.chance("rejected", number) % len(worse)]
