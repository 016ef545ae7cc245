"""Scores from a language model for a sample of documents: what a classifier is trained on (`smol classifier`).

An additive scale: a point for each property that the text has, 0 to 5 in all, a line of reasons, then the score. The
scales of FineWeb-Edu (Llama-3-70B-Instruct on 500,000 pages, aimed at grade school), FineMath (reasoning at the level of
middle and high school; its first pass has three points) and Stack-Edu (code, one classifier a language) had these
properties (FineWeb paper, section 4; SmolLM2 paper, section 3); the words here are our own. Documents go through
`endpoint`, so that every answer is on the disk before it is used; an answer without a score is counted and left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from datatrove.data import Document

from megatron_smol.curate.endpoint import Answer, Endpoint, Failed, Request, chat
from megatron_smol.curate.parts import written
from megatron_smol.errors import DataError


class Scale(NamedTuple):
    """What is judged, and the properties that give a point each."""

    what: str
    points: tuple[str, ...]


SCALES = {
    "edu": Scale(
        "how useful this web page would be for teaching from primary school to grade school",
        (
            "it says something about a subject that is taught, even among advertisements or unrelated matter",
            "it deals with such a subject, though loosely, mixed with other things, or badly organised",
            "it fits a school curriculum: key ideas, told coherently, with few gaps and little that is beside the point",
            "it is clear, consistent and well built, as a chapter of a textbook or a tutorial, and asks for no special knowledge",
            "it is outstanding for teaching: reasons in detail, easy to follow, nothing that does not belong",
        ),
    ),
    "maths-page": Scale(
        "whether this web page has mathematics to learn from",
        (
            "it mentions mathematics, numbers or formulas at all",
            "it uses them: a calculation, a formula or an argument is carried out",
            "it derives or solves something step by step",
        ),
    ),
    "maths": Scale(
        "how useful this web page would be for learning to reason mathematically at the level of middle and high school",
        (
            "it has some mathematics, even if it is incidental, a list of results or a machine's output",
            "it deals with a mathematical question, though too hard, too easy, or without a solution",
            "it solves a problem or explains an idea of that level, with the main steps in order",
            "its steps are complete and explained, and the notation is right, so that a pupil could follow it alone",
            "it is outstanding: worked out in full, with reasons for every step and nothing that does not belong",
        ),
    ),
    "code": Scale(
        "how useful this {language} file would be for learning to program",
        (
            "it is program code that does something, and not only data, settings or generated text",
            "it shows an idea of programming, though mixed with boilerplate or hard to follow",
            "its structure, names and comments let a learner see what it does and why",
            "it teaches: one purpose, small well-named parts, explained where it must be, without special knowledge",
            "it is outstanding for teaching: like the worked example of a good course, nothing that does not belong",
        ),
    ),
}
_ASK = """Judge {what}. Start from 0 and add a point for each of these that is true; each asks for more than the one before:
{points}

The text{cut}:
----
{text}
----

{answer} "Score: " and the sum of the points, a whole number from 0 to {most}."""
# With reasons, or the score alone: (what is asked for, tokens of an answer at most).
_ANSWERS = {
    True: ("Give your reasons in at most 100 words. Then end with one line,", 300),
    False: ("Give no reasons. Answer with this one line:", 12),
}
_SCORE = re.compile(r"score\W{0,6}(\d+(?:\.\d+)?)", re.IGNORECASE)
_NUMBER_ALONE = re.compile(r"\W*(\d+(?:\.\d+)?)(?:\s*/\s*\d+)?\W*(?:\n|$)")


@dataclass
class Outcome:
    """What came of it. scores: documents by score; failed: documents without one, by reason."""

    scores: Counter[int] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


def request_of(
    document: Document, scale: Scale, characters: int, reasons: bool = True, begin: str = ""
) -> Request:
    """The question about a document, of which the first `characters` are shown."""
    answer, tokens = _ANSWERS[reasons]
    cut = "" if len(document.text) <= characters else f" (its first {characters} characters)"
    prompt = _ASK.format(
        what=scale.what.replace("{language}", str(document.metadata.get("language", "source"))),
        points="\n".join(f"{number}. {point}" for number, point in enumerate(scale.points, 1)),
        cut=cut, text=document.text[:characters], most=len(scale.points), answer=answer,
    )  # fmt: skip
    messages, more = [{"role": "user", "content": prompt}], {}
    if begin:  # as vLLM and SGLang name it; OpenAI's own API has nothing like it
        messages.append({"role": "assistant", "content": begin})
        more = {"add_generation_prompt": False, "continue_final_message": True}
    return chat(messages, temperature=0.0, max_tokens=tokens, **more)


def score_in(text: str, most: int) -> int | None:
    """The last "Score: n" of an answer, or the number that it begins with; None when there is none, or none of the scale."""
    found = _SCORE.findall(text) or _NUMBER_ALONE.match(text)
    if not found:
        return None
    score = float(found[-1] if isinstance(found, list) else found[1])
    return int(score) if score.is_integer() and score <= most else None


def annotate(
    documents: Iterable[Document],
    model: Endpoint,
    scale: Scale,
    output: Path,
    characters: int,
    tell: Callable[[], None] = lambda: None,
    reasons: bool = True,
    begin: str = "",
) -> Outcome:
    """Write {text, id, score, reasons, ...} lines, in the documents' order; the file is whole or absent.

    reasons: asked for before the score, as FineWeb-Edu did; begin: of the answer. tell: called after each document. Raises DataError when not one document got a score.
    """
    outcome = Outcome()

    def ask(document: Document) -> tuple[Document, Answer | Failed]:
        return document, model.ask(request_of(document, scale, characters, reasons, begin))

    with written(output) as stream:
        for document, answer in model.map(ask, documents):
            if (row := _row(document, answer, scale, outcome, begin)) is not None:
                stream.write(orjson.dumps(row, default=str) + b"\n")
            tell()
        if not outcome.scores:
            why = (
                ", ".join(f"{reason} {count:,}" for reason, count in outcome.failed.most_common())
                or "no documents"
            )
            raise DataError(f"not one document got a score ({why}); nothing is written to {output}")
    return outcome


def _row(
    document: Document, answer: Answer | Failed, scale: Scale, outcome: Outcome, begin: str
) -> dict[str, Any] | None:
    if isinstance(answer, Failed):
        outcome.failed[answer.reason] += 1
        return None
    said = begin + answer.text
    score = score_in(said, len(scale.points))
    if score is None:
        outcome.failed["no score in the answer"] += 1
        return None
    outcome.scores[score] += 1
    return document.metadata | {
        "text": document.text, "id": document.id, "score": score, "reasons": said.strip(),
    }  # fmt: skip


def sampled(documents: Iterator[Document], count: int, seed: int) -> list[Document]:
    """`count` documents drawn evenly, in their order; the same ones for the same input and seed (reservoir)."""
    import random

    chance, kept = random.Random(seed), []
    for number, document in enumerate(documents):
        if number < count:
            kept.append((number, document))
        elif (place := chance.randrange(number + 1)) < count:
            kept[place] = (number, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])]
