"""The page about a set of chat rows, in the form of a curation's: HTML, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from megatron_smol.curate.card import render
from megatron_smol.curate.chat.config import ChatData
from megatron_smol.curate.chat.rows import sample, text_of, turns_of

_SHOWN = 5
_FIELDS = ("category", "quality", "difficulty", "reward", "margin")


def write_card(
    config: ChatData,
    output: Path,
    parts: list[dict[str, Any]],
    common: list[dict[str, Any]],
    taken: dict[str, tuple[int, int]],
    written: tuple[Counter[str], Counter[str]],
    usage: dict[str, dict[str, Any]],
) -> None:
    """card.json and card.html. taken: rows there and rows taken, by part; written: of train and test, by part."""
    about = facts(config, output, parts, common, taken, written, usage)
    render(about, output)


def facts(
    config: ChatData,
    output: Path,
    parts: list[dict[str, Any]],
    common: list[dict[str, Any]],
    taken: dict[str, tuple[int, int]],
    written: tuple[Counter[str], Counter[str]],
    usage: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Everything on the page, as plain data."""
    funnel, dropped = _funnel(parts, common)
    train, test = written
    rows = {part: train[part] + test[part] for part in taken}
    funnel.append(_taken(taken, sum(len(text_of(row)) for row in _rows(output))))
    return {
        "name": config.name,
        "funnel": funnel,
        "notes": list(_notes(config, taken, written, usage)),
        "dropped": dropped,
        "kept": [sample(row) for row in islice(_rows(output), _SHOWN)],
        "shares": {"part": sorted(rows.items(), key=lambda item: -item[1])} | _shares(output),
        "curves": [],
        "histograms": [],
        "epochs": None,
        "tokens_per_character": None,
        "models": usage,
        "rows": {"train": sum(train.values()), "test": sum(test.values())},
    }


def _funnel(
    parts: list[dict[str, Any]], common: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for all parts, so that shares are of all; one for each step of each part; the common steps."""
    firsts = [part["stages"][0] for part in parts]
    whole: dict[str, Any] = {"step": "all parts"} | {
        name: sum(stage[name] for stage in firsts)
        for name in ("documents_in", "kept", "dropped", "characters_kept")
    }
    reasons: Counter[str] = Counter()
    for stage in firsts:
        reasons.update(stage["reasons"])
    funnel = [whole | {"reasons": dict(reasons.most_common())}]
    dropped: dict[str, Any] = {}
    named = [(f"{part['part']}: {stage['step']}", stage) for part in parts for stage in part["stages"]]
    named += [(f"all: {stage['step']}", stage) for stage in common]
    for title, stage in named:
        samples = stage["dropped_samples"]
        funnel.append({name: stage[name] for name in stage if name != "dropped_samples"} | {"step": title})
        if samples:
            dropped[title] = [*dropped.get(title, []), *samples]
    return funnel, dropped


def _taken(taken: dict[str, tuple[int, int]], characters: int) -> dict[str, Any]:
    there, kept = (sum(pair[place] for pair in taken.values()) for place in (0, 1))
    return {
        "step": "mix", "documents_in": there, "kept": kept, "dropped": there - kept, "characters_kept": characters,
        "reasons": {f"more than asked for of {name}": n - k for name, (n, k) in taken.items() if n > k},
    }  # fmt: skip


def _notes(
    config: ChatData,
    taken: dict[str, tuple[int, int]],
    written: tuple[Counter[str], Counter[str]],
    usage: dict[str, dict[str, Any]],
) -> Iterator[str]:
    train, test = (sum(counts.values()) for counts in written)
    yield f"{train:,} rows in train.jsonl" + (f", {test:,} in test.jsonl" if test else "")
    for part in config.parts:
        if part.take is not None and taken[part.name][0] < part.take:
            yield f"{part.name} has {taken[part.name][0]:,} rows; {part.take:,} were asked for"
    for name, used in usage.items():
        yield (
            f"model {name}: {used['answers']:,} answers paid, {used['prompt_tokens']:,} tokens read, "
            f"{used['completion_tokens']:,} written, ${used['dollars']:,.2f}"
            + "".join(
                f"; {kind}: " + ", ".join(f"{reason} {count:,}" for reason, count in used[kind].items())
                for kind in ("retried", "failed")
                if used[kind]
            )
        )


def _shares(output: Path) -> dict[str, list[tuple[str, int]]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("source", "turns", *_FIELDS)}
    for row in _rows(output):
        counts["source"][str(row["source"])] += 1
        counts["turns"][str(sum(turn["role"] == "user" for turn in turns_of(row)))] += 1
        for name in _FIELDS:
            if (value := row.get(name)) is not None:
                counts[name][f"{value:g}" if isinstance(value, float) else str(value)] += 1
    return {name: found.most_common(16) for name, found in counts.items() if found}


def _rows(output: Path) -> Iterator[dict[str, Any]]:
    for name in ("train.jsonl", "test.jsonl"):
        if (output / name).is_file():
            with (output / name).open("rb") as stream:
                for line in stream:
                    yield orjson.loads(line)
