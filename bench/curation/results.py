"""bench/results/curation.json from what the steps found, and its table for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.common import RESULTS, machine
from bench.curation.place import Place
from megatron_smol.data.files import write_whole


def write(place: Place, steps: list[str]) -> Path:
    """All that was found so far; steps that did not run are named."""
    found = {step: facts for step in steps if (facts := place.found(step)) is not None}
    about = {
        "command": "python -m bench.curation",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "not_run": [step for step in steps if step not in found],
        "found": found,
    }
    to = RESULTS if place.share == 1 else place.folder  # a part is no result
    to.mkdir(parents=True, exist_ok=True)
    write_whole(to / "curation.json", json.dumps(_rounded(about), indent=1) + "\n")
    write_whole(to / "curation.md", table(about))
    return to / "curation.md"


def table(about: dict[str, Any]) -> str:
    """Markdown."""
    m, found = about["machine"], about["found"]
    lines = [
        "# Curation on real text",
        "",
        f"Made by `{about['command']}` on {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {about['date']}, "
        "from [curation.json](curation.json). Seconds are of a machine that others used too.",
    ]
    if about["not_run"]:
        lines.append(f"\nNot run: {', '.join(about['not_run'])}.")
    for step, part in (
        ("pipelines", _pipelines), ("train", _training), ("heads", _heads), ("encoders", _heads), ("annotate", _annotated),
        ("from-model", _heads), ("duplicates", _duplicates), ("gsm8k", _gsm8k), ("kills", _kills), ("chat", _chat),
    ):  # fmt: skip
        if step in found:
            lines += ["", f"## {_TITLES[step]}", "", *part(found[step])]
    return "\n".join(lines) + "\n"


_TITLES = {
    "pipelines": "Shipped pipelines",
    "train": "Tokenized and trained on",
    "heads": "Classifiers of hashed words, on labels by the rule",
    "encoders": "Three kinds of features, on the same labels by the rule",
    "annotate": "SmolLM2-135M-Instruct as annotator",
    "from-model": "Classifiers on its scores",
    "duplicates": "Planted near duplicates",
    "gsm8k": "Planted leaks of GSM8K",
    "kills": "Kills",
    "chat": "Conversations by SmolLM2-135M-Instruct",
}


def _pipelines(found: dict[str, Any]) -> list[str]:
    lines = ["| pipeline | read | left | s | dropped by step |", "|---|---|---|---|---|"]
    for name, row in found.items():
        if isinstance(row, dict):
            dropped = ", ".join(f"{step} {count:,}" for step, count in row["dropped"].items() if count)
            lines.append(
                f"| {name} | {row['read_documents']:,} documents, {row['read_megabytes']:.1f} MB | {row['kept_documents']:,}, "
                f"{row['kept_megabytes']:.1f} MB | {row['seconds']:.0f} | {dropped} |"
            )
    return lines


def _training(found: dict[str, Any]) -> list[str]:
    tokens = ", ".join(f"{name} {count:,}" for name, count in found["tokens"].items())
    return [
        f"Tokens: {tokens}. `smol train` read all of them: {found['steps']} steps, loss {found['first_loss']:.2f} to "
        f"{found['last_loss']:.2f}."
    ]


def _heads(found: dict[str, Any]) -> list[str]:
    if "left_out" in found:
        return [f"Left out: {found['left_out']}."]
    lines = [
        "| head | documents | macro-F1 (95 %) | by length alone | above length (95 %) | documents/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if isinstance(row, dict):
            low, high = row["macro_f1_95"]
            least, most = row["macro_f1_above_length_95"]
            lines.append(
                f"| {name} | {row['documents']:,} | {row['macro_f1']:.3f} ({low:.3f} to {high:.3f}) | {row['macro_f1_by_length_alone']:.3f} | "
                f"{least:+.3f} to {most:+.3f} | {row['documents_per_second']:,.0f} |"
            )
    return lines


def _annotated(found: dict[str, Any]) -> list[str]:
    lines = [
        f"Left to itself: {free['scored']} of {free['asked']} answers {what} had one ({'; '.join(free['said'])})."
        for what, free in (("with reasons", found["reasons"]), ("without reasons", found["no-reasons"]))
    ]
    if "scores" not in found:
        return [
            f'{found["asked"]:,} documents whose answer was made to begin with "Score:": none went on with one.',
            *lines,
        ]
    given = ", ".join(f"{score}: {count}" for score, count in found["scores"].items())
    rank = (
        "none"
        if found["rank_correlation"] is None
        else f"{found['rank_correlation']:.2f} (p {found['p']:.2g})"
    )
    return [
        f"{found['asked']:,} documents whose answer was made to begin with 'Score:', {found['scored']:,} scores ({given}). With the rule: equal {found['equal']:.1%} "
        f"(by chance {found['equal_by_chance']:.1%}), kappa {found['kappa']:.3f}, rank correlation {rank}.", *lines,
    ]  # fmt: skip


def _duplicates(found: dict[str, Any]) -> list[str]:
    lines = ["| shape | similarity | found | theory | standard error |", "|---|---|---|---|---|"]
    for shape, rows in found["shapes"].items():
        lines += [
            f"| {shape} | {row['similarity']} | {row['found']:.3f} | {row['theory']:.3f} | {row['error']:.3f} |"
            for row in rows
        ]
    return lines


def _gsm8k(found: dict[str, Any]) -> list[str]:
    if "left_out" in found:
        return [f"Left out: {found['left_out']}."]
    return [
        f"{found['found']} of {found['planted']} test questions hidden in pages were found; of the training set "
        f"{found['train_dropped']} of {found['train']:,} ({found['train_share']:.2%}) went."
    ]


def _kills(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['kills']} kills of a run and all its workers at random moments of `stack-edu`: {found['files_equal']} files "
        f"byte-equal to the uninterrupted run's, the card too, {found['left_over']} files left over."
    ]


def _chat(found: dict[str, Any]) -> list[str]:
    asked = ", ".join(f"{part} {count}" for part, count in found["asked"].items())
    return [f"Asked for {asked}; {found['rows']} rows stayed, and `smol sft` trained on them once."]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
