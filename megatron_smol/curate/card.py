"""The page about a curation: what went in, what each step dropped and why, what is left; HTML and the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_smol.curate.config import Curation
from megatron_smol.curate.duplicates import found_share
from megatron_smol.curate.kept import samples_of, shares_of
from megatron_smol.curate.steps import MinHash
from megatron_smol.data.files import write_whole

_SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
_MOST_SHARES = 12
_SHOWN = 3


def write_card(config: Curation, output: Path) -> None:
    """card.json and card.html in the output folder, from the records of all ranks (whatever run wrote them)."""
    about = facts(config, output)
    write_whole(output / "card.json", json.dumps(about, indent=1) + "\n")
    from jinja2 import Environment, PackageLoader, select_autoescape

    loader = PackageLoader("megatron_smol", "report")
    environment = Environment(loader=loader, autoescape=select_autoescape(default=True), trim_blocks=True)
    write_whole(output / "card.html", environment.get_template("curation.html").render(card=about))


def facts(config: Curation, output: Path) -> dict[str, Any]:
    """Everything on the page, as plain data."""
    from megatron_smol.curate.pipeline import Layout, input_files, phases_of

    layout = Layout(output)
    funnel: list[dict[str, Any]] = []
    notes: list[str] = []
    for phase in phases_of(config, input_files(config.inputs.paths), layout):
        totals = _totals(layout.logs(phase.name) / "stats")
        for title, counts in zip(phase.titles, totals, strict=False):
            if not title:
                continue
            if phase.alone:
                notes.append(
                    f"{title}: {counts.get('groups', 0):,}, the largest of {counts.get('largest_group', 0):,} documents"
                )
            elif "forwarded" in counts:
                funnel.append(_row(title, counts))
            elif counts.get("characters_removed"):
                notes.append(f"{title}: {counts['characters_removed']:,} removed")
    steps = [step.title for step in config.steps]
    shares = shares_of(layout.work / "shares")
    return {
        "name": config.name,
        "funnel": funnel,
        "notes": notes,
        "dropped": {
            title: found
            for number, title in enumerate(steps)
            if (found := samples_of(layout.samples(number), _SHOWN))
        },
        "kept": samples_of(layout.work / "samples" / "kept", _SHOWN),
        "shares": {name: counts.most_common(_MOST_SHARES) for name, counts in shares.items() if counts},
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
        "tokens_per_character": _tokens_per_character(config, layout.documents),
    }


def _row(title: str, counts: dict[str, int]) -> dict[str, Any]:
    kept = counts.get("forwarded", 0)
    reasons = {name.removeprefix("dropped_"): n for name, n in counts.items() if name.startswith("dropped_")}
    return {
        "step": title, "documents_in": counts.get("total", 0), "kept": kept, "dropped": counts.get("dropped", 0),
        "characters_kept": counts.get("doc_len", 0), "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
    }  # fmt: skip


def _totals(folder: Path) -> list[dict[str, int]]:
    """For each block of a phase, the sum of every rank's counts."""
    sums: list[dict[str, int]] = []
    for path in sorted(folder.glob("*.json")):
        for number, block in enumerate(json.loads(path.read_text())):
            if number == len(sums):
                sums.append({})
            for name, value in block["stats"].items():
                amount = value["total"] if isinstance(value, dict) else value
                sums[number][name] = sums[number].get(name, 0) + int(amount)
    return sums


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
