"""Filters by the score of a document: at least so much, or a share of each score.

What a document was given is counted by score before anything is dropped, for the card's histogram.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_smol.curate.kept import FewDropped
from megatron_smol.errors import UserError

if TYPE_CHECKING:
    from megatron_smol.curate.classifier import Classifier
    from megatron_smol.curate.steps import Sample, Score

SCORED = "scored_"  # of the counts: scored_2.5 is the documents whose score is nearest to 2.5
_BATCH = 256  # documents that a classifier sees at once


def histogram_bin(score: float) -> str:
    """Tenths, so that a probability and a score from 0 to 5 both show their shape."""
    return f"{score:.1f}"


class ScoreAtLeast(BaseFilter):
    """Keeps by a score that the document has; with a model, by the model's, which is written into the document."""

    type, name = "filter", "score"

    def __init__(self, rule: Score, few: FewDropped) -> None:
        super().__init__(exclusion_writer=few, batch_size=_BATCH if rule.model else 1)
        if rule.model is not None and not rule.model.is_dir():
            raise UserError(f"no classifier at {rule.model}; make one with `smol classifier`")
        self.rule = rule
        self._loaded: dict[str, Classifier] = {}

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        if self.rule.model is not None:
            groups: dict[str, list[Document]] = {}
            for doc in batch:
                groups.setdefault(self._kind(doc), []).append(doc)
            for kind, docs in groups.items():
                self._score(kind, docs)
        return [self.filter(doc) for doc in batch]

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        kind = self._kind(doc)
        if self.rule.by is not None and kind in self.rule.without_model:
            return True
        score = doc.metadata.get(self.rule.field)
        if not isinstance(score, int | float):
            return False, "no_score"
        self.stat_update(SCORED + histogram_bin(score))
        compared = round(score) if self.rule.rounded else score
        return compared >= self.rule.keep_of.get(kind, self.rule.keep) or (False, "score_below")

    def _kind(self, doc: Document) -> str:
        return "" if self.rule.by is None else str(doc.metadata.get(self.rule.by, ""))

    def _score(self, kind: str, docs: list[Document]) -> None:
        """Scores into the documents; of a kind without a classifier, none."""
        from megatron_smol.curate.classifier import Classifier

        assert self.rule.model is not None
        folder = self.rule.model / kind
        if self.rule.by is not None and (kind in self.rule.without_model or not folder.is_dir()):
            return
        if kind not in self._loaded:
            self._loaded[kind] = Classifier.load(folder)
        for doc, score in zip(docs, self._loaded[kind].scores([doc.text for doc in docs]), strict=True):
            doc.metadata[self.rule.field] = round(float(score), 3)


class Sampled(BaseFilter):
    """Keeps a share by whole score; the same document is kept or dropped wherever and whenever it is read."""

    type, name = "filter", "sample"

    def __init__(self, rule: Sample, few: FewDropped) -> None:
        super().__init__(exclusion_writer=few)
        self.rule = rule

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        score = doc.metadata.get(self.rule.field)
        if not isinstance(score, int | float):
            return False, "no_score"
        share = self.rule.shares.get(round(score), 1.0)
        digest = hashlib.sha256(f"{self.rule.seed} {doc.text}".encode(errors="replace")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64  # even in [0, 1)
        return place < share or (False, f"sampled_{round(score)}")
