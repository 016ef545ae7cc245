"""What the card shows of a curation: a few documents that each step dropped, a few that stayed, and who they are.

Small files per rank under `samples/` and `shares/`, written whole at the end of a rank, so that a rank that is run again
replaces its own.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from megatron_smol.curate.domains import domain_of
from megatron_smol.data.files import write_whole

FEW = 3  # documents a step and a rank
SHOWN_CHARACTERS = 600
CONTAMINATION = "contamination"  # metadata of a dropped document: which item, which n-gram, how much of it


def excerpt(document: Document) -> dict[str, Any]:
    reason = document.metadata.get("filter_reason")
    shown = {
        "id": str(document.metadata.get("url") or document.id),
        "text": document.text[:SHOWN_CHARACTERS],
        "characters": len(document.text),
    }
    return shown | ({"reason": str(reason)} if reason else {})


class FewDropped:
    """Stands where datatrove wants a writer of excluded documents: keeps the first few, and of contamination every hit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._few: list[dict[str, Any]] = []
        self._hits: list[dict[str, Any]] = []
        self._rank = 0

    def __enter__(self) -> FewDropped:
        self._few, self._hits = [], []
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        self._rank = rank
        if len(self._few) < FEW:
            self._few.append(excerpt(document))
        if hit := document.metadata.get(CONTAMINATION):
            url = document.metadata.get("url")
            self._hits.append({"document": str(document.id)} | ({"url": url} if url else {}) | hit)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None and self._few:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{self._rank:05d}.json", json.dumps(self._few))
            if self._hits:
                write_whole(self.folder / f"{self._rank:05d}.hits", json.dumps(self._hits))


class Describe(PipelineStep):
    """Passes the kept documents on; counts their domains, languages and lengths, and the scores of each domain."""

    type, name = "card", "shares"

    def __init__(self, folder: Path, samples: Path) -> None:
        super().__init__()
        self.folder, self.samples = folder, samples

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        shares: dict[str, Counter[str]] = {
            "domain": Counter(),
            "language": Counter(),
            "length": Counter(),
        }
        scores: dict[str, Counter[int]] = {}
        few = FewDropped(self.samples)
        with few:
            for document in data:
                about = document.metadata
                score = about.get("score")
                if url := about.get("url"):
                    shares["domain"][domain := domain_of(url)] += 1
                    if isinstance(score, int | float):
                        scores.setdefault(domain, Counter())[round(score)] += 1
                if language := about.get("language"):
                    shares["language"][str(language)] += 1
                shares["length"][str(max(0, len(document.text).bit_length() - 1))] += 1
                few.write(document, rank)
                self.stat_update("characters", value=len(document.text))
                yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"{rank:05d}.json", json.dumps({"shares": shares, "domain_scores": scores}))


def shares_of(folder: Path) -> tuple[dict[str, Counter[str]], dict[str, Counter[int]]]:
    """All ranks' shares together, and how many pages of each domain have each whole score."""
    shares: dict[str, Counter[str]] = {}
    scores: dict[str, Counter[int]] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        for name, counts in found["shares"].items():
            shares.setdefault(name, Counter()).update(counts)
        for domain, counts in found["domain_scores"].items():
            scores.setdefault(domain, Counter()).update({int(score): n for score, n in counts.items()})
    return shares, scores


def samples_of(folder: Path, most: int = FEW) -> list[dict[str, Any]]:
    """A few, of as many ranks as there are: the documents of one are often of one site."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    turns = zip_longest(*found)
    return [sample for turn in turns for sample in turn if sample is not None][:most]


def hits_of(samples: Path) -> list[dict[str, Any]]:
    """Of all steps and ranks: which document held which item of which benchmark, by which n-gram."""
    return [hit for path in sorted(samples.glob("*/*.hits")) for hit in json.loads(path.read_text())]
