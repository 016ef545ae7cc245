"""Classifiers on the labels: every head against a guess by length alone; three kinds of features on the same labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.common import say
from bench.curation.place import Place, rows_of, write_rows
from megatron_smol.errors import RunError

FOLDS = 4
# Of the encoders, on the same labels: tokens that they see. SmolLM2 is five times MiniLM's size.
MINILM, SMOLLM2 = ("--length", 256), ("--length", 128, "--pooling", "mean")
_ENCODED = 500  # documents


def train(place: Place) -> dict[str, Any]:
    """Heads of hashed words for all pipelines, and for `edu` the encoders beside them."""
    heads = place.models / "heads"
    facts = {}
    for name in ("edu", "dclm", "maths", "maths-page"):
        kind = ("--kind", "binary") if name == "dclm" else ()
        cut = ("--threshold", 2) if name == "maths-page" else ()
        facts[name] = _head(place, place.labels / f"{name}.jsonl", heads / name, *kind, *cut)
    for path in sorted((place.labels / "stack-edu").glob("*.jsonl")):
        facts[path.stem] = _head(place, path, heads / "stack-edu" / path.stem)
    return facts


def encoders(place: Place) -> dict[str, Any]:
    """The same documents, labels and parts for each kind of features."""
    few = write_rows(
        place.labels / "edu-few.jsonl", list(rows_of(place.labels / "edu.jsonl"))[: place.part(_ENCODED, 60)]
    )
    folder = place.models / "encoders"
    return {
        "hashed words": _head(place, few, folder / "hashed"),
        "all-MiniLM-L6-v2": _head(place, few, folder / "minilm", "--encoder", place.minilm, *MINILM),
        "SmolLM2-135M-Instruct": _head(place, few, folder / "smollm2", "--encoder", place.smollm2, *SMOLLM2),
    }


def from_model(place: Place) -> dict[str, Any]:
    """Can what SmolLM2 said be learned? Hashed words and MiniLM on its scores."""
    labels = place.labels / "edu-by-model.jsonl"
    folder = place.models / "from-model"
    try:
        return {
            "hashed words": _head(place, labels, folder / "hashed"),
            "all-MiniLM-L6-v2": _head(place, labels, folder / "minilm", "--encoder", place.minilm, *MINILM),
        }
    except RunError as error:  # too few scores, or all of them alike
        return {"left_out": str(error).splitlines()[-1]}


def _head(place: Place, labels: Path, output: Path, *more: object) -> dict[str, Any]:
    say(f"smol classifier {output.name}")
    place.smol("classifier", labels, "--output", output, "--folds", FOLDS, *more)
    about = json.loads((output / "classifier.json").read_text())
    wanted = ("documents", "macro_f1", "macro_f1_95", "macro_f1_by_length_alone", "macro_f1_above_length_95", "documents_per_second", "thresholds")  # fmt: skip
    return {name: about["report"][name] for name in wanted}
