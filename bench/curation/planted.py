"""What was put there on purpose is found: near duplicates, leaks of a benchmark; and a killed pipeline ends as another."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.common import ROOT, say
from bench.curation.pipelines import settings_of
from bench.curation.place import Place, rows_of, write_rows
from megatron_smol.curate.contamination import words_of
from megatron_smol.curate.duplicates import found_share, minhash_keys
from megatron_smol.errors import RunError

SHAPES = {"1 band of 10": (1, 10), "14 bands of 8": (14, 8)}
SIMILARITIES = (0.6, 0.7, 0.8, 0.9, 0.95)
PAIRS, DRAWS, NGRAM = 250, 50, 5
LEAKS, KILLS = 100, 10
_ITEM_WORDS = 40
_KILLED = (
    "golang-1.19-src",
    "phpunit",
    "python3-django",
    "python3-sympy",
    "rust-src",
)  # packages whose code is read


def duplicates(place: Place) -> dict[str, Any]:
    """Passages of real text and copies with words changed: the share found, beside what theory gives for their overlap.

    Each pair is drawn for with many sets of hash functions; the error is the spread over pairs.
    """
    chance = random.Random(0)
    texts = [
        words for row in rows_of(place.inputs / "texts.jsonl") if len(words := _plain(row["text"])) > 400
    ]
    facts: dict[str, Any] = {}
    count = place.part(PAIRS, 20)
    for wanted in SIMILARITIES:
        pairs = [_pair(chance.choice(texts), wanted, chance) for _ in range(count)]
        for name, (bands, rows) in SHAPES.items():
            found, theory = [], []
            for seed, (one, other, overlap) in enumerate(pairs):
                keys = minhash_keys([one, other], NGRAM, DRAWS * bands, rows, seed)
                found.append((keys[0] == keys[1]).reshape(DRAWS, bands).any(1).mean())
                theory.append(found_share(overlap, bands, rows))
            off = np.array(found) - theory
            facts.setdefault(name, []).append(
                {"similarity": wanted, "pairs": count, "draws": DRAWS, "found": float(np.mean(found)), "theory": float(np.mean(theory)), "error": float(off.std() / count**0.5)}
            )  # fmt: skip
    return {"shapes": facts}


def _pair(words: list[str], similarity: float, chance: random.Random) -> tuple[bytes, bytes, float]:
    """A passage, a copy with so many words changed, and the overlap that their n-grams really have."""
    start = chance.randrange(len(words) - 300)
    one = words[start : start + 300]
    other, changed = list(one), 0
    places = list(range(300))
    chance.shuffle(places)
    while (overlap := _overlap(one, other)) > similarity and places:
        changed += 1
        other[places.pop()] = f"changed{'abcdefghij'[changed % 10]}{'abcdefghij'[changed // 10 % 10]}"
    return " ".join(one).encode(), " ".join(other).encode(), overlap


def _plain(text: str) -> list[str]:
    """Words of letters alone: what the keys make of others (numbers are one word to them) is not what is measured."""
    return [word for word in words_of(text) if word.isascii() and word.isalpha()]


def _overlap(one: list[str], other: list[str]) -> float:
    """Jaccard of their n-grams."""
    sets = [{tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)} for words in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


# --- leaks -------------------------------------------------------------------------------------------------


def benchmark(place: Place) -> dict[str, Any]:
    """inputs/leaks.jsonl, which stands for the benchmarks in the pipelines: passages of the maths pages' own text."""
    chance = random.Random(1)
    items: list[str] = []
    rows = [
        row
        for row in rows_of(place.folder / "text" / "maths" / "documents")
        if len(row["text"].split()) > 200
    ]
    for row in chance.sample(rows, LEAKS):
        words = row["text"].split()
        start = chance.randrange(len(words) - _ITEM_WORDS)
        items.append(" ".join(words[start : start + _ITEM_WORDS]))
    write_rows(place.inputs / "leaks.jsonl", [{"question": item} for item in items])
    return {"items": len(items)}


def gsm8k(place: Place) -> dict[str, Any]:
    """Test questions hidden in real pages, beside the whole training set: how many are found, how many of the others go."""
    if place.benchmarks is None:
        say("no --benchmarks: left out")
        return {"left_out": "gsm8k_train.jsonl and gsm8k_test.jsonl were not given (--benchmarks)"}
    chance, folder = random.Random(2), place.folder / "gsm8k"
    test = list(rows_of(place.benchmarks / "gsm8k_test.jsonl"))
    pages = [row["text"] for row in rows_of(place.folder / "text" / "web" / "documents")]
    planted = []
    for number in chance.sample(range(len(test)), LEAKS):
        page, question = chance.choice(pages)[:4000], test[number]["question"]
        cut = chance.randrange(len(page))
        planted.append({"id": f"planted/{number}", "text": f"{page[:cut]} {question} {page[cut:]}"})
    train = [{"id": f"train/{n}", "text": f"{row['question']}\n{row['answer']}"} for n, row in enumerate(rows_of(place.benchmarks / "gsm8k_train.jsonl"))]  # fmt: skip
    write_rows(folder / "documents.jsonl", planted + train)
    step = {"decontaminate": {"files": [str(place.benchmarks / "gsm8k_test.jsonl")], "fields": ["question"], "ngram": 13, "ratio": 0.6}}  # fmt: skip
    config = folder / "curation.yaml"
    settings = {"name": "gsm8k", "inputs": {"paths": str(folder / "documents.jsonl")}, "output": str(folder / "out"), "steps": [step], "tasks": 1}  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    place.smol("curate", config, "--overwrite")
    gone = [hit["document"].split("/")[0] for hit in rows_of(folder / "out" / "contamination.jsonl")]
    return {
        "planted": LEAKS, "found": gone.count("planted"), "train": len(train), "train_dropped": gone.count("train"),
        "train_share": gone.count("train") / len(train),
    }  # fmt: skip


# --- kills -------------------------------------------------------------------------------------------------


def kills(place: Place) -> dict[str, Any]:
    """kill -9 of stack-edu and all its workers at random moments; the same command ends it; bytes and totals compared."""
    folder = place.folder / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "stack-edu.yaml"
    settings = settings_of(place, "stack-edu") | {"output": str(folder / "whole")}
    settings["inputs"]["paths"] = [str(place.inputs / "code" / package) for package in _KILLED]
    config.write_text(yaml.safe_dump(settings))
    _, seconds = place.smol("curate", config)
    chance, output, struck = random.Random(3), folder / "killed", []
    command = place.command("curate", config, "--output", output)
    for number in range(times := place.part(KILLS, 2)):
        running = subprocess.Popen(command, cwd=ROOT, env=place.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        moment = chance.uniform(0.1, 0.6) * seconds
        time.sleep(moment)
        alive = running.poll() is None
        if alive:
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        struck.append(alive)
        say(f"kill {number + 1} of {times} after {moment:.0f} s{'' if alive else ': had ended'}")
        if not alive:  # begun anew, or nothing would be left to kill
            _same(folder / "whole", output)
            shutil.rmtree(output)
    place.smol("curate", config, "--output", output)
    files = _same(folder / "whole", output)
    return {"kills": sum(struck), "seconds_whole": seconds, "files_equal": files, "left_over": len(list(output.rglob("*.partial")))}  # fmt: skip


def _same(one: Path, other: Path) -> int:
    """Documents byte for byte, and what the card counts. RunError for the first difference."""
    names = [{file.name for file in _documents(folder)} for folder in (one, other)]
    if names[0] != names[1]:
        raise RunError(f"after kills other files: {sorted(names[0] ^ names[1])[:3]}")
    for file in _documents(one):
        if file.read_bytes() != (other / "documents" / file.name).read_bytes():
            raise RunError(f"after kills {file.name} differs")
    cards = [json.loads((folder / "card.json").read_text()) for folder in (one, other)]
    if cards[0] != cards[1]:
        raise RunError("after kills the cards differ")
    return len(names[0])


def _documents(folder: Path) -> Iterator[Path]:
    return iter(sorted((folder / "documents").iterdir()))
