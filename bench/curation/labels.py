"""Scores to learn: by a rule, and by a language model (`smol annotate`); how far the two agree.

The rule counts what explaining text has, as rates. Documents are then ranked among those of the same source and of like
length, and a document's score is its sixth of that rank: source and length tell nothing about it by construction, and
what a classifier beats chance by, it read. It is no judgement of quality, and no label of FineWeb-Edu's.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from bench.common import say
from bench.curation.place import Place, rows_of, write_rows
from megatron_smol.errors import RunError

CHARACTERS = 2500  # of a document, that the rule, the language model and the classifiers are shown
PROSE, CODE = 1800, 900  # documents of a set of labels
ANNOTATED, FREE = 300, 10
_ALIKE = 36  # documents of one source and of like length that are ranked together
_WORD = re.compile(r"[A-Za-z']+")
_EXPLAINING = frozenset(
    [
        "because",
        "therefore",
        "thus",
        "hence",
        "so",
        "since",
        "why",
        "how",
        "example",
        "instance",
        "suppose",
        "consider",
        "note",
        "means",
        "mean",
        "explain",
        "understand",
        "reason",
        "called",
        "define",
        "defined",
        "let",
        "if",
        "then",
        "when",
        "first",
        "second",
        "finally",
        "for",
        "although",
        "however",
        "instead",
        "simply",
        "idea",
    ]
)
_ADDRESSING = frozenset(["you", "your", "we", "our", "us", "let"])
_MATHS = re.compile(r"[=+*^<>∑∫√≤≥∈]|\\[a-z]+|\d|\b(?:theorem|proof|matri\w+|polynomial\w*|integral\w*|equation\w*|group|ring|field|vector\w*|prime\w*)\b")  # fmt: skip
_COMMENT = re.compile(r"^\s*(?:#|//|/\*|\*|--|'''|\"\"\")")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
Rates = Callable[[str], list[float]]


def by_rule(place: Place) -> dict[str, Any]:
    """labels/edu, dclm, maths-page, maths .jsonl and labels/stack-edu/LANGUAGE.jsonl."""
    facts = {}
    web, maths = (_shown(place, name) for name in ("web", "maths"))
    edu = _ranked(web, _prose, 6)
    write_rows(place.labels / "edu.jsonl", edu)
    write_rows(place.labels / "dclm.jsonl", [row | {"score": int(row["score"] >= 4)} for row in edu])
    write_rows(place.labels / "maths.jsonl", _ranked(maths, _mathematical, 6))
    # Which page is of mathematics is what sources differ in: ranked over all of them.
    write_rows(place.labels / "maths-page.jsonl", _ranked([row | {"source": ""} for row in maths], _mathematical, 4))  # fmt: skip
    for name in ("edu", "dclm", "maths", "maths-page"):
        facts[name] = dict(Counter(row["score"] for row in rows_of(place.labels / f"{name}.jsonl")))
    for language, rows in sorted(_code(place).items()):
        if len(rows) >= place.part(6 * _ALIKE, 60):
            write_rows(place.labels / "stack-edu" / f"{language}.jsonl", _ranked(rows, _teaching, 6))
            facts[language] = len(rows)
    return {"documents": facts}


def by_model(place: Place) -> dict[str, Any]:
    """`smol annotate` by SmolLM2-135M-Instruct, of documents that the rule scored too: put in the answer's mouth, and free."""
    chosen = list(rows_of(place.labels / "edu.jsonl"))[: place.part(ANNOTATED, 8)]
    alone, said = _asked(place, chosen, "edu-by-model", "--no-reasons", "--begin", "Score:")
    facts: dict[str, Any] = {"asked": len(chosen), "scored": len(alone), "said": said}
    if alone:
        rule = {row["id"]: row["score"] for row in chosen}
        pairs = np.array([(rule[row["id"]], row["score"]) for row in alone])
        facts["scores"] = {str(k): int(n) for k, n in sorted(Counter(pairs[:, 1].tolist()).items())}
        facts |= agreement(pairs[:, 0], pairs[:, 1])
    free = place.part(FREE, 2)
    for name in ("reasons", "no-reasons"):
        scored, said = _asked(place, chosen[:free], f"edu-by-model-{name}", f"--{name}")
        facts[name] = {"asked": free, "scored": len(scored), "said": said}
    return facts


def _asked(
    place: Place, rows: list[dict[str, Any]], name: str, *more: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows that got a score, and what the command said."""
    given = write_rows(
        place.labels / f"{name}-asked.jsonl", [{"text": r["text"], "id": r["id"]} for r in rows]
    )
    output = place.labels / f"{name}.jsonl"
    model = ("--endpoint", place.endpoint, "--model", "SmolLM2-135M-Instruct") if place.endpoint else ("--model", place.smollm2)  # fmt: skip
    say(f"asking SmolLM2-135M-Instruct about {len(rows)} documents {' '.join(more)}")
    try:
        said, _ = place.smol(
            "annotate", given, "--output", output, "--scale", "edu", "--count", len(rows), "--concurrency", 2,
            "--timeout", 600, "--characters", 1200, *model, *more,
        )  # fmt: skip
    except RunError as error:
        if "not one document got a score" not in str(error):
            raise
        return [], [str(error).split("error: ")[-1].split(";")[0]]
    return list(rows_of(output)), said.strip().splitlines()[:4]


def agreement(one: Any, other: Any) -> dict[str, Any]:
    """Equal scores, Cohen's kappa with squared weights, rank correlation, each with what chance would leave."""
    from scipy.stats import spearmanr
    from sklearn.metrics import cohen_kappa_score

    constant = len(set(other.tolist())) < 2
    kappa = 0.0 if constant else float(cohen_kappa_score(one, other, weights="quadratic"))
    rank = None if constant else spearmanr(one, other)
    shares = [np.bincount(scores, minlength=6)[:6] / len(scores) for scores in (one, other)]
    return {
        "equal": float(np.mean(one == other)), "equal_by_chance": float(shares[0] @ shares[1]),
        "kappa": kappa, "rank_correlation": rank and float(rank.statistic), "p": rank and float(rank.pvalue),
    }  # fmt: skip


# --- the rule ----------------------------------------------------------------------------------------------


def _prose(text: str) -> list[float]:
    words = [word.lower() for word in _WORD.findall(text)] or [""]
    sentences = [len(_WORD.findall(part)) for part in re.split(r"[.!?](?:\s|$)", text) if part.strip()] or [0]
    return [
        sum(word in _EXPLAINING for word in words) / len(words),
        sum(word in _ADDRESSING for word in words) / len(words),
        -float(np.mean([abs(length - 18) for length in sentences])),
        sum(character.isalpha() or character.isspace() for character in text) / max(1, len(text)),
    ]


def _mathematical(text: str) -> list[float]:
    words = max(1, len(_WORD.findall(text)))
    return [len(_MATHS.findall(text)) / words, _prose(text)[0]]


def _teaching(text: str) -> list[float]:
    """Of source code: a fifth of comments, words in them, names that are words, short lines, little nesting."""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    comments = [line for line in lines if _COMMENT.match(line)]
    names = [name for name in _IDENTIFIER.findall(text) if len(name) > 1] or [""]
    return [
        -abs(len(comments) / len(lines) - 0.2),
        len(_WORD.findall(" ".join(comments))) / len(lines),
        float(np.mean([len(name) for name in names])),
        -float(np.mean([max(0, len(line) - 80) for line in lines])),
        -float(np.mean([len(line) - len(line.lstrip()) for line in lines])),
    ]


def _ranked(rows: Sequence[dict[str, Any]], rates: Rates, scores: int) -> list[dict[str, Any]]:
    """Rows with `score`: the mean rank of their rates, among rows of the same source and of like length."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["source"]].append(row)
    found = []
    for group in groups.values():
        group.sort(key=lambda row: (len(row["text"]), row["id"]))
        for start in range(0, len(group), _ALIKE):
            alike = group[start : start + _ALIKE]
            if len(alike) >= scores:
                values = np.array([rates(row["text"]) for row in alike])
                places = values.argsort(0).argsort(0).mean(1).argsort().argsort()
                found += [
                    row | {"score": int(place * scores // len(alike))}
                    for row, place in zip(alike, places, strict=True)
                ]
    random.Random(0).shuffle(found)
    return found


# --- documents ---------------------------------------------------------------------------------------------


def _shown(place: Place, name: str) -> list[dict[str, Any]]:
    """As many of each source, of what `smol curate` extracted; a text twice is taken once."""
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seen = set()
    for row in rows_of(place.folder / "text" / name / "documents"):
        text = cut(row["text"])
        if len(text) > 300 and text not in seen:
            seen.add(text)
            url = row["metadata"]["url"]
            by_source[urlsplit(url).netloc].append({"text": text, "id": url, "source": urlsplit(url).netloc})
    return _even(by_source, place.part(PROSE, 300))


def _code(place: Place) -> dict[str, list[dict[str, Any]]]:
    """Of each language, as many files of each package."""
    from megatron_smol.curate.code import language_of, source_text

    files: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    root = place.inputs / "code"
    for file in sorted(root.rglob("*")):
        if file.is_file() and (language := language_of(file.name)):
            text = cut(source_text(str(file))[0] or "")
            name = str(file.relative_to(root))
            if len(text) > 300:
                package = name.split("/")[0]
                files[language][package].append({"text": text, "id": name, "source": package})
    return {language: _even(packages, place.part(CODE, 120)) for language, packages in files.items()}


def _even(by_source: dict[str, list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    share = count // max(1, len(by_source))
    chance = random.Random(0)
    return [row for rows in by_source.values() for row in chance.sample(rows, min(share, len(rows)))]


def cut(text: str) -> str:
    """The first CHARACTERS, up to the end of a line."""
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rsplit("\n", 1)[0]
