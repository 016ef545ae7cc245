"""Constraints on an answer that a program can check, named as in IFEval (Zhou et al. 2023); `constrained` asks for them.

Each has its arguments drawn at random, words for the instruction, and a check. Two constraints that would touch the same
property of the answer (its letters' case, its beginning, its layout, ...) are never asked together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, NamedTuple

Arguments = dict[str, Any]
_WORDS = ("always", "because", "between", "change", "clear", "during", "early", "example", "first", "future", "great",
          "however", "important", "simple", "small", "together", "usually", "water", "world", "yesterday")  # fmt: skip
_ENDINGS = ("Is there anything else I can help with?", "That is all you need to know.", "I hope this helps.")


class Constraint(NamedTuple):
    """draw: arguments; words: of the instruction; holds: whether an answer keeps it; touches: properties of the answer."""

    draw: Callable[[Random], Arguments]
    words: Callable[[Arguments], str]
    holds: Callable[[str, Arguments], bool]
    touches: frozenset[str]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _compared(found: int, arguments: Arguments, name: str) -> bool:
    wanted: int = arguments[name]
    return found < wanted if arguments["relation"] == "less than" else found >= wanted


def _relation(random: Random, name: str, least: tuple[int, ...], most: tuple[int, ...]) -> Arguments:
    relation = random.choice(("at least", "less than"))
    return {"relation": relation, name: random.choice(least if relation == "at least" else most)}


def _is_json(text: str, _: Arguments) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except ValueError:
        return False
    return True


def _highlights(text: str, arguments: Arguments) -> bool:
    found = re.findall(r"\*\*[^*\n]*\S[^*\n]*\*\*|(?<!\*)\*[^*\n]*\S[^*\n]*\*(?!\*)", text)
    return len(found) >= arguments["num_highlights"]


def _bullets(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*]|-)", text, re.MULTILINE)) == arguments["num_bullets"]


def _paragraphs(text: str, arguments: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = [part for number, part in enumerate(parts) if part.strip() or 0 < number < len(parts) - 1]
    return all(part.strip() for part in inner) and len(inner) == arguments["num_paragraphs"]


def _two(text: str, _: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _upper_words(text: str, arguments: Arguments) -> bool:
    capital = [word for word in _words(text) if word.isupper() and any(map(str.isalpha, word))]
    return _compared(len(capital), arguments, "capital_frequency")


def _none(random: Random) -> Arguments:
    return {}


def _of(name: str, *values: Any) -> Callable[[Random], Arguments]:
    return lambda random: {name: random.choice(values)}


def _made(
    draw: Callable[[Random], Arguments],
    words: str,
    holds: Callable[[str, Arguments], bool],
    touches: str,
) -> Constraint:
    return Constraint(draw, lambda arguments: words.format(**arguments), holds, frozenset(touches.split()))


CONSTRAINTS: Mapping[str, Constraint] = {
    "punctuation:no_comma": _made(_none, "Do not use any commas.", lambda t, a: "," not in t, "commas"),
    "length_constraints:number_words": _made(
        lambda r: _relation(r, "num_words", (50, 80, 120, 200), (60, 100, 150, 250)),
        "Answer with {relation} {num_words} words.",
        lambda t, a: _compared(len(_words(t)), a, "num_words"), "length",
    ),
    "length_constraints:number_paragraphs": _made(
        _of("num_paragraphs", 2, 3, 4),
        "Write {num_paragraphs} paragraphs, with the line *** between each two of them.", _paragraphs, "layout",
    ),
    "detectable_format:number_bullet_lists": _made(
        _of("num_bullets", 2, 3, 4, 5),
        "Write exactly {num_bullets} bullet points, each on a line of its own that begins with '* '.", _bullets, "layout",
    ),
    "detectable_format:number_highlighted_sections": _made(
        _of("num_highlights", 1, 2, 3),
        "Highlight at least {num_highlights} parts with asterisks, such as *this part*.", _highlights, "marks",
    ),
    "detectable_format:title": _made(
        _none, "Give the answer a title in double angular brackets, such as <<title>>.",
        lambda t, a: any(inner.strip(" <>") for inner in re.findall(r"<<([^\n]+)>>", t)), "title",
    ),
    "detectable_format:json_format": _made(
        _none, "Give the whole answer as JSON.", _is_json, "layout marks title start end commas extra",
    ),
    "detectable_content:postscript": _made(
        _of("postscript_marker", "P.S.", "P.P.S"), "Add a postscript at the end that begins with {postscript_marker}",
        lambda t, a: re.search(rf"^\s*{re.escape(a['postscript_marker'])}\s*\S", t, re.M | re.I) is not None, "end",
    ),
    "detectable_content:number_placeholders": _made(
        _of("num_placeholders", 1, 2, 3), "Use at least {num_placeholders} placeholders in square brackets, such as [name].",
        lambda t, a: len(re.findall(r"\[[^\]]*\]", t)) >= a["num_placeholders"], "extra",
    ),
    "change_case:english_lowercase": _made(
        _none, "Write in lowercase letters only.", lambda t, a: t.islower(), "case",
    ),
    "change_case:english_capital": _made(
        _none, "Write in capital letters only.", lambda t, a: t.isupper(), "case",
    ),
    "change_case:capital_word_frequency": _made(
        lambda r: _relation(r, "capital_frequency", (2, 4), (3, 5)),
        "Write {relation} {capital_frequency} words in capital letters only.", _upper_words, "case",
    ),
    "startend:end_checker": _made(
        _of("end_phrase", *_ENDINGS), "End with exactly these words and nothing after them: {end_phrase}",
        lambda t, a: t.strip().strip('"').lower().endswith(a["end_phrase"].lower()), "end case",
    ),
    "startend:quotation": _made(
        _none, "Put the whole answer between double quotation marks.",
        lambda t, a: len(t.strip()) > 2 and t.strip()[0] == t.strip()[-1] == '"', "start end",
    ),
    "combination:two_responses": _made(
        _none, "Give two different answers, with six asterisks (******) between them and nowhere else.", _two, "layout marks",
    ),
    "keywords:existence": _made(
        lambda r: {"keywords": r.sample(_WORDS, 2)}, "Use these words: {keywords[0]} and {keywords[1]}.",
        lambda t, a: all(_count(t, word) for word in a["keywords"]), "words",
    ),
    "keywords:forbidden_words": _made(
        lambda r: {"forbidden_words": r.sample(_WORDS, 2)},
        "Do not use these words: {forbidden_words[0]} and {forbidden_words[1]}.",
        lambda t, a: not any(_count(t, word) for word in a["forbidden_words"]), "words",
    ),
    "keywords:frequency": _made(
        lambda r: {"keyword": r.choice(_WORDS)} | _relation(r, "frequency", (2, 3), (2, 3)),
        "Use the word {keyword} {relation} {frequency} times.",
        lambda t, a: _compared(_count(t, a["keyword"]), a, "frequency"), "words",
    ),
    "keywords:letter_frequency": _made(
        lambda r: {"letter": r.choice("bcdfghjkmpvwy")} | _relation(r, "let_frequency", (4, 8), (6, 12)),
        "Use the letter {letter} {relation} {let_frequency} times.",
        lambda t, a: _compared(t.lower().count(a["letter"]), a, "let_frequency"), "letters",
    ),
}  # fmt: skip


def draw(random: Random, most: int) -> list[tuple[str, Arguments]]:
    """One to `most` constraints that can be kept together."""
    wanted, taken = random.randint(1, most), set[str]()
    drawn: list[tuple[str, Arguments]] = []
    for name in random.sample(sorted(CONSTRAINTS), len(CONSTRAINTS)):
        constraint = CONSTRAINTS[name]
        if len(drawn) < wanted and not constraint.touches & taken:
            drawn.append((name, constraint.draw(random)))
            taken |= constraint.touches
    return drawn


def unkept(text: str, asked: list[tuple[str, Arguments]]) -> list[str]:
    """Names of the constraints that an answer breaks. Raises KeyError for a name that is not here."""
    return [name for name, arguments in asked if not CONSTRAINTS[name].holds(text, arguments)]
