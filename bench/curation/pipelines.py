"""The shipped curation files on the packed inputs, then `smol preprocess` of what each leaves, then one training run.

What a shipped file names and a laptop has not (the crawl, the models, the benchmarks) is replaced; its steps, their order
and their parameters stay.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bench.common import ROOT, say
from bench.curation.place import Place, rows_of
from megatron_smol.recipe.load import load_yaml

EXAMPLES = ROOT / "examples" / "curate"
TASKS = 8
# In an order in which each finds what it reads. Paths below the bench's folder; `inputs/` are pages, `text/` their text.
READS = {
    "fineweb-edu": "inputs/web",
    "dclm-mix": "text/web/documents",
    "dclm-edu": "out/dclm-mix/documents",
    "finemath-pages": "text/maths/documents",
    "finemath": "inputs/maths",
    "finemath-4plus": "out/finemath/documents",
    "infi-webmath": "inputs/infi",
    "stack-edu": "inputs/code",
    "long-context": "inputs/texts.jsonl",
}
SOURCES = ("fineweb-edu", "dclm-mix", "dclm-edu", "finemath", "infi-webmath", "stack-edu", "long-context")
_RECIPE = """
name: curated
run_dir: {folder}/run
tokenizer: {tokenizer}
model: {{layers: 2, hidden_size: 64, heads: 4, kv_heads: 2, ffn_size: 192, vocab_size: 49152, tied_embeddings: true}}
data: {{seed: 1, holdout_tokens: 2048, over_epochs: warn}}
sources: {{{sources}}}
training: {{seq_length: 256, rope_base: 10000, global_batch: 16, micro_batch: 8, precision: fp32}}
stages:
  - name: curated
    until: 8 steps
    mixture: {{{mixture}}}
lr: {{peak: 1e-2, warmup: 2 steps, decay_start: 6 steps}}
eval: {{windows_per_source: 4}}
"""


def extract(place: Place) -> dict[str, Any]:
    """text/web and text/maths: the pages as text and no step, to draw documents from and to count what is read."""
    facts = {}
    for name in ("web", "maths"):
        settings = {
            "name": name,
            "inputs": {"paths": str(place.inputs / name)},
            "steps": [],
            "tasks": place.part(TASKS, 2),
        }
        facts[name] = _carry_out(place, settings, place.folder / "text" / name)
    return facts


def curate(place: Place) -> dict[str, Any]:
    """All shipped pipelines; for each the funnel."""
    return {name: one(place, name) for name in READS}


def one(place: Place, name: str) -> dict[str, Any]:
    if name == "infi-webmath":
        _infi(place)
    return _carry_out(place, settings_of(place, name), place.folder / "out" / name)


def settings_of(place: Place, name: str) -> dict[str, Any]:
    """examples/curate/NAME.yaml with what is at hand in place of what it names."""
    settings = load_yaml(EXAMPLES / f"{name}.yaml") | {"tasks": place.part(TASKS, 2)}
    settings["inputs"] = settings["inputs"] | {"paths": str(place.folder / READS[name])}
    if "domains" in settings["inputs"]:
        listed = str(place.folder / "out" / "finemath-pages" / "domains.jsonl")
        settings["inputs"]["domains"] = settings["inputs"]["domains"] | {"files": [listed]}
    settings["steps"] = [_at_hand(place, step) for step in settings["steps"]]
    return settings


def _at_hand(place: Place, step: Any) -> Any:
    name, given = (step, {}) if isinstance(step, str) else next(iter(step.items()))
    if name == "language":
        return {name: given | {"model": str(place.models / "lid.176.ftz")}}
    if name == "length":
        return {name: given | {"tokenizer": str(place.smollm2)}}
    if name == "decontaminate":
        files = [str(place.inputs / "leaks.jsonl")]
        return {name: given | {"files": files, "fields": ["question"]}}
    if name == "score" and "model" in given:
        head = Path(given["model"]).name
        own = {"model": str(place.models / "heads" / head)}
        if not given.get(
            "rounded", True
        ):  # DCLM's cut keeps a tenth by DCLM's classifier: as ours says for a tenth
            report = json.loads((place.models / "heads" / head / "classifier.json").read_text())["report"]
            own["keep"] = report["thresholds"][2]["threshold"]
        return {name: given | own}
    return step


def _infi(place: Place) -> None:
    """Extracted pages with mathematics as parquet, as InfiMM-WebMath is."""
    path = place.inputs / "infi" / "pages.parquet"
    if not path.is_file():
        rows = [{"text": r["text"], "url": r["metadata"]["url"]} for r in rows_of(place.folder / "text/maths/documents")]  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)


def _carry_out(place: Place, settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """`smol curate`; documents and megabytes read and left, and why the others went."""
    config = place.folder / "configs" / f"{output.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings | {"output": str(output)}, sort_keys=False))
    say(f"smol curate {output.name}")
    _, seconds = place.smol("curate", config, "--overwrite", "--tokenizer", place.smollm2)
    card = json.loads((output / "card.json").read_text())
    first = card["funnel"][0]
    documents = list(rows_of(output / "documents"))
    dropped: Counter[str] = Counter()
    for row in card["funnel"][1:]:
        dropped[row["step"]] += row["dropped"]
    return {
        "read_documents": first["kept"], "read_megabytes": first["characters_kept"] / 1e6,
        "not_read": first["reasons"], "kept_documents": len(documents),
        "kept_megabytes": sum(len(row["text"]) for row in documents) / 1e6, "seconds": seconds,
        "dropped": dict(dropped),
    }  # fmt: skip


def tokenize_and_train(place: Place) -> dict[str, Any]:
    """Every pipeline's documents through `smol preprocess`; one recipe reads them all."""
    folder = place.folder / "training"
    shutil.rmtree(folder, ignore_errors=True)
    tokens = {}
    for name in SOURCES:
        say(f"smol preprocess {name}")
        data = folder / name
        place.smol("preprocess", place.folder / "out" / name / "documents", "--output", data, "--tokenizer", place.smollm2)  # fmt: skip
        tokens[name] = json.loads((data / "manifest.json").read_text())["tokens"]
    sources = ", ".join(f"{name}: {{path: {folder / name}}}" for name in SOURCES)
    share = round(1 / len(SOURCES), 4)
    shares = [share] * (len(SOURCES) - 1)
    shares.append(round(1 - sum(shares), 4))
    mixture = ", ".join(f"{name}: {weight}" for name, weight in zip(SOURCES, shares, strict=True))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        _RECIPE.format(folder=folder, tokenizer=place.smollm2, sources=sources, mixture=mixture)
    )
    say("smol train, 8 steps of all of them")
    _, seconds = place.smol("train", recipe)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "tokens": tokens, "steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1],
        "seconds": seconds,
    }  # fmt: skip
