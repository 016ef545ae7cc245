"""The page about a curation: what went in, what each step dropped and why, what is left; HTML and the same as JSON."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_smol.curate.config import Curation
from megatron_smol.curate.domains import table
from megatron_smol.curate.duplicates import found_share
from megatron_smol.curate.epochs import reading
from megatron_smol.curate.kept import hits_of, samples_of, shares_of
from megatron_smol.curate.scoring import SCORED, ScoreAtLeast
from megatron_smol.curate.steps import Decontaminate, MinHash
from megatron_smol.data.files import write_whole

_SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
_MOST_SHARES = 12
_SHOWN = 3
_DECIDES = {"forwarded", "dropped"}  # counts of a block that keeps some documents and drops others


def write_card(config: Curation, output: Path) -> None:
    """card.json and card.html in the output folder, from the records of all ranks (whatever run wrote them)."""
    about, scores = facts(config, output)
    if scores:
        write_whole(output / "domains.jsonl", table(scores))
    if any(isinstance(step, Decontaminate) for step in config.steps):
        about["contamination"] = _contamination(output)
    render(about, output)


def _contamination(output: Path) -> dict[str, Any]:
    """Writes contamination.jsonl, every hit of it; the card shows the first."""
    from megatron_smol.curate.pipeline import Layout

    hits = hits_of(Layout(output).work / "samples")
    write_whole(output / "contamination.jsonl", "".join(json.dumps(hit) + "\n" for hit in hits))
    benchmarks = Counter(hit["benchmark"] for hit in hits).most_common()
    return {"hits": len(hits), "benchmarks": benchmarks, "shown": hits[:_MOST_SHARES]}


def render(about: dict[str, Any], output: Path) -> None:
    """The facts as card.json and as a page."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    write_whole(output / "card.json", json.dumps(about, indent=1) + "\n")
    loader = PackageLoader("megatron_smol", "report")
    environment = Environment(loader=loader, autoescape=select_autoescape(default=True), trim_blocks=True)
    write_whole(output / "card.html", environment.get_template("curation.html").render(card=about))


def facts(config: Curation, output: Path) -> tuple[dict[str, Any], dict[str, Counter[int]]]:
    """Everything on the page, as plain data; and the scores of the pages of each domain."""
    from megatron_smol.curate.pipeline import Layout, input_files, phases_of

    layout = Layout(output)
    phases = phases_of(config, input_files(config.inputs), layout)
    counts = [
        (title, phase.alone, block)
        for phase in phases
        for title, block in zip(phase.titles, _totals(layout.logs(phase.name) / "stats"), strict=False)
    ]
    rows = [
        (title, block) for title, alone, block in counts if title and not alone and block.keys() & _DECIDES
    ]
    shares, domain_scores = shares_of(layout.work / "shares")
    ratio = _tokens_per_character(config, layout.documents)
    written = sum(block.get("characters", 0) for _, _, block in counts)  # told by the last phase alone
    read = reading(config)
    about = {
        "name": config.name,
        "funnel": [_row(title, block) for title, block in rows],
        "notes": [note for title, alone, block in counts if title for note in _notes(title, alone, block)],
        "dropped": {
            title: found
            for number, title in enumerate(_distinct([step.title for step in config.steps]))
            if (found := samples_of(layout.samples(number), _SHOWN))
        },
        "kept": samples_of(layout.work / "samples" / "kept", _SHOWN),
        "shares": {name: _share(name, counts) for name, counts in shares.items() if counts},
        "curves": [
            {
                "ngram": s.ngram,
                "bands": s.bands,
                "rows": s.rows,
                "found": [[value, round(found_share(value, s.bands, s.rows), 3)] for value in _SIMILARITIES],
            }
            for s in config.steps
            if isinstance(s, MinHash)
        ],
        "histograms": [
            {"step": title, "scores": scores, "columns": _columns(scores)}
            for title, block in rows
            if (scores := _histogram(block))
        ],
        "tokens_per_character": ratio,
        "epochs": read.of(round((ratio or 0) * written)) if read else None,
    }
    return about, domain_scores


def _share(name: str, counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent; lengths in their order, by the powers of two that they lie between."""
    if name != "length":
        return counts.most_common(_MOST_SHARES)
    return [
        (f"{1 << int(bits):,} to {(2 << int(bits)) - 1:,} characters", counts[bits])
        for bits in sorted(counts, key=int)
    ]


def _notes(title: str, alone: bool, counts: dict[str, int]) -> Iterator[str]:
    if alone:
        largest = counts.get("largest_group", 0)
        yield f"{title}: {counts.get('groups', 0):,}, the largest of {largest:,} documents"
    if removed := counts.get("characters_removed"):
        yield f"{title}: {removed:,} removed"
    if empty := counts.get("empty_files"):
        yield f"{title}: {empty:,} input files have no bytes"


def _distinct(titles: list[str]) -> list[str]:
    """A step that is there again is numbered."""
    return [
        title if titles.index(title) == number else f"{title} ({titles[: number + 1].count(title)})"
        for number, title in enumerate(titles)
    ]


def _row(title: str, counts: dict[str, int]) -> dict[str, Any]:
    kept = counts.get("forwarded", 0)
    reasons = {name.removeprefix("dropped_"): n for name, n in counts.items() if name.startswith("dropped_")}
    return {
        "step": title, "documents_in": counts.get("total", 0), "kept": kept, "dropped": counts.get("dropped", 0),
        "characters_kept": counts.get("doc_len", 0), "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
    }  # fmt: skip


def _histogram(counts: dict[str, int]) -> list[tuple[float, int]]:
    """Documents by the score that they were given, before the step dropped any."""
    return sorted(
        (float(name.removeprefix(SCORED)), n) for name, n in counts.items() if name.startswith(SCORED)
    )


def _columns(scores: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Every tenth from the lowest score to the highest, also those that nobody has; scores far apart as they are."""
    tenths = {round(10 * score): count for score, count in scores}
    low, high = min(tenths), max(tenths)
    return [(n / 10, tenths.get(n, 0)) for n in range(low, high + 1)] if high - low <= 100 else scores


def speeds(titles: list[str], blocks: list[Any], logs: Path) -> Iterator[tuple[str, float]]:
    """(title, documents a second of one worker) of the steps with a classifier; from the tasks' own times."""
    totals = _totals(logs / "stats")
    seconds: dict[int, float] = defaultdict(float)
    for path in (logs / "stats").glob("*.json"):
        for number, block in enumerate(json.loads(path.read_text())):
            seconds[number] += _amount(block["time_stats"])
    for number, (title, block) in enumerate(zip(titles, blocks, strict=True)):
        if isinstance(block, ScoreAtLeast) and block.rule.model and seconds[number]:
            yield title, totals[number].get("total", 0) / seconds[number]


def _totals(folder: Path) -> list[dict[str, int]]:
    """For each block of a phase, the sum of every rank's counts."""
    sums: list[dict[str, int]] = []
    for path in sorted(folder.glob("*.json")):
        for number, block in enumerate(json.loads(path.read_text())):
            if number == len(sums):
                sums.append({})
            for name, value in block["stats"].items():
                sums[number][name] = sums[number].get(name, 0) + int(_amount(value))
    return sums


def _amount(value: Any) -> float:
    """datatrove writes a sum alone, or with its mean and spread."""
    return float(value["total"] if isinstance(value, dict) else value)


def _tokens_per_character(config: Curation, documents: Path) -> float | None:
    """Measured on the first documents of each part; None without a tokenizer."""
    if config.tokenizer is None:
        return None
    from itertools import islice

    from megatron_smol.curate.parts import ReadPart
    from megatron_smol.data.tokenizer import load_tokenizer

    tokenizer, tokens, characters = load_tokenizer(config.tokenizer), 0, 0
    for rank in range(config.tasks):
        for document in islice(ReadPart(documents).run(None, rank), 20):
            tokens += len(tokenizer.encode_batch([document.text])[0])
            characters += len(document.text)
    return tokens / characters if characters else None
