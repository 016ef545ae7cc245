"""Scores of conversations: by a language model, by fields that rows have, or by a check of the answer.

MagPie-Ultra was tagged for difficulty and quality by Llama-3.1-8B-Instruct and given a reward by ArmoRM-8B; where SmolTalk
cut is not public. UltraFeedback's answers were rated by GPT-4. The words of the questions are our own.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import regex

from megatron_smol.curate.annotate import score_in
from megatron_smol.curate.chat.tools import NoAnswer, Tools
from megatron_smol.curate.endpoint import chat
from megatron_smol.post.rows import Message

Asked = Literal["quality", "difficulty", "reward"]


class Scale(NamedTuple):
    what: str
    most: int


SCALES: dict[str, Scale] = {
    "quality": Scale(
        "how clear, specific and well put the user's questions are: 1 very poor, 2 poor, 3 average, 4 good, 5 excellent", 5
    ),
    "difficulty": Scale(
        "how hard the user's questions are to answer: 1 very easy, 2 easy, 3 medium, 4 hard, 5 very hard", 5
    ),
    "reward": Scale(
        "the assistant's last answer: does it do what was asked, is it true, is it honest about what is not known, does it "
        "help: from 1, useless or wrong, to 10, nothing to improve",
        10,
    ),
}  # fmt: skip
# The tags of MagPie-Ultra's rows.
_LABELS = {
    "very poor": 1, "poor": 2, "average": 3, "good": 4, "excellent": 5,
    "very easy": 1, "easy": 2, "medium": 3, "hard": 4, "very hard": 5,
}  # fmt: skip
_ASK = """Judge {what}.

The conversation:
----
{conversation}
----

Give your reasons in one or two sentences. Then end with one line, "Score: " and a whole number from 1 to {most}."""


def asked_score(tools: Tools, model: str, scale: str, turns: list[Message]) -> float:
    """What the model gives the conversation, from 1 to the scale's most. Raises NoAnswer when it gives none."""
    what, most = SCALES[scale]
    conversation = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in turns)
    prompt = _ASK.format(what=what, conversation=conversation, most=most)
    said = tools.say(model, chat([{"role": "user", "content": prompt}], temperature=0.0, max_tokens=200))
    if not (score := score_in(said, most)):
        raise NoAnswer("judge gave no score")
    return float(score)


def number_of(value: Any) -> float:
    """A score that a row has, as a number or as a tag. Raises NoAnswer."""
    if isinstance(value, str) and value.strip().lower() in _LABELS:
        return float(_LABELS[value.strip().lower()])
    try:
        return float(value)
    except (TypeError, ValueError):
        raise NoAnswer(f"score {value!r} is no number") from None


# --- answers that can be checked -----------------------------------------------------------------------------

_NUMBER = re.compile(r"-?(?:\d[\d,]*)?(?:\.\d+|\d)(?:/[1-9]\d*)?")
_BOXED = regex.compile(r"\\boxed\s*(\{(?:[^{}]++|(?1))*+\})")
_FORMULA = re.compile(r"\^|\\[a-z]*(?:frac|sqrt)")  # its last number alone is another value
_LATEX = (
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac\{)"), " "),  # 3\frac{1}{2} is three and a half
    (re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\^\{(\w+)\}"), r"^\1"),
    (re.compile(r"(?<=\d)[\s\\,;!~]*\\(?:text|mathrm|mbox)\{[^{}]*\}$"), ""),  # a unit
    (re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}"), r"\1"),
)


def final_answer(text: str) -> str:
    r"""Of a solution: what stands in the last \boxed{}, after the last ####, or the last number, else the last line."""
    if boxed := _BOXED.findall(text):
        return _plain(boxed[-1][1:-1])
    if "####" in text:
        return _plain(text.rsplit("####", 1)[1])
    return _plain(_last_number(text) or (text.strip().splitlines() or [""])[-1])


def _last_number(text: str) -> str:
    """The last number, as the formula that it is a part of; "" where there is none."""
    words = _without_latex(text).split()
    for place in reversed(range(len(words))):
        if numbers := _NUMBER.findall(words[place]):
            before = words[place - 1].lstrip("$*") if place else ""
            if "/" in numbers[-1] and before.isdigit():
                return f"{before} {numbers[-1]}"
            return words[place].rsplit("=", 1)[-1] if _FORMULA.search(words[place]) else str(numbers[-1])
    return ""


def _without_latex(text: str) -> str:
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _plain(text: str) -> str:
    """Numbers that are equal become the same text."""
    text = _without_latex(text.strip().lstrip("$* ").rstrip("$*. ")).lower()
    if not _NUMBER.fullmatch(text):
        return text
    over, _, under = text.replace(",", "").partition("/")
    return str(Fraction(over) / Fraction(under or 1))


def same_answer(text: str, right: str) -> bool:
    return final_answer(text) == final_answer(right)


def kept_share(text: str, row: dict[str, Any]) -> float:
    """Of the constraints in "instruction_id_list" and "kwargs", the share that the answer keeps. Raises NoAnswer."""
    from megatron_smol.curate.chat.constraints import CONSTRAINTS, unkept

    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or not names:
        raise NoAnswer("no instruction_id_list and kwargs in the row")
    if unknown := sorted(set(map(str, names)) - set(CONSTRAINTS)):
        raise NoAnswer(f"constraint '{unknown[0]}' is not known")
    asked = [
        (name, {key: value for key, value in (given or {}).items() if value is not None})
        for name, given in zip(names, arguments, strict=False)
    ]
    try:
        return 1 - len(unkept(text, asked)) / len(asked)
    except KeyError as error:
        raise NoAnswer(f"a constraint without its argument {error}") from None
