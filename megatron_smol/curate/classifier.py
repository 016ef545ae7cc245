"""A quality classifier: trained on annotated documents, judged on held-out ones, used by the `score` step.

FineWeb-Edu's way (`scale`): text features, frozen, and one regression output on the 0-5 scale of the annotations; the
score is rounded for the F1 figures and compared with a threshold. DCLM's way (`binary`): documents like wanted ones (1:
instructions and their answers) against any others (0: the web), one logistic output, the top tenth is kept (Li et al.
2024). Features are a frozen Hugging Face encoder's (FineWeb-Edu, FineMath and Stack-Edu used such; encoder.py) or, without
a model, hashed words, marks and their pairs, much as fastText's, which need nothing but a processor.
What it learned is a vector: it is stored as numpy arrays and JSON, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_smol.curate.encoder import Encoder, Pooling
from megatron_smol.curate.head import MOST, fit, judge, length_alone, scores_of
from megatron_smol.curate.parts import write_array
from megatron_smol.data.files import write_whole
from megatron_smol.errors import DataError, UserError

_FEATURES = 1 << 18
# Words, marks, and the beginnings of lines: comments and nesting are what tells good source code, marks good prose.
_TOKEN = r"\n[ \t]*|\w+|[^\w\s]"
_CHARACTERS = 20_000  # of a document that are looked at
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Settings:
    """encoder: a Hugging Face model, None for hashed words; length: tokens it sees; pooling: of its tokens, None as it says."""

    encoder: str | None = None
    length: int = 512
    kind: Literal["scale", "binary"] = "scale"
    pooling: Pooling | None = None


class Features:
    """Texts to rows of features; the same text always gives the same row."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, texts: Sequence[str]) -> Any:
        """[texts, features], sparse or dense."""
        shown = [text[:_CHARACTERS] for text in texts]
        return self._hashed_rows(shown) if self.settings.encoder is None else self.encoder(shown)

    def _hashed_rows(self, texts: list[str]) -> Any:
        """Log counts brought to one length, so that neither a long text nor a word that it repeats weighs more."""
        from sklearn.preprocessing import normalize

        rows = self._hashed.transform(texts)
        rows.data = 1 + np.log(rows.data)
        return normalize(rows, copy=False)

    @cached_property
    def _hashed(self) -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(
            n_features=_FEATURES, ngram_range=(1, 2), alternate_sign=False, token_pattern=_TOKEN, norm=None
        )

    @cached_property
    def encoder(self) -> Encoder:
        assert self.settings.encoder is not None
        return Encoder(self.settings.encoder, self.settings.pooling, self.settings.length)


@lru_cache(maxsize=4)
def _shared(settings: Settings) -> Features:
    """Heads of one encoder (Stack-Edu has fifteen) load it once."""
    return Features(settings)


@dataclass
class Classifier:
    """weights[features] and bias of the regression; `report` is what it scored on held-out documents."""

    settings: Settings
    weights: NDArray[np.float64]
    bias: float
    report: dict[str, Any]

    def scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """One score a text: from 0 to 5, of a binary classifier a probability."""
        output = np.asarray(_shared(self.settings)(texts) @ self.weights).ravel() + self.bias
        return scores_of(output, self.settings.kind)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_array(folder / "weights.npy", self.weights)
        about = {"settings": asdict(self.settings), "bias": self.bias, "report": self.report}
        write_whole(folder / "classifier.json", json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        try:
            about = json.loads((folder / "classifier.json").read_text())
            weights = np.load(folder / "weights.npy", allow_pickle=False)
            return cls(Settings(**about["settings"]), weights, float(about["bias"]), about["report"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} holds no classifier ({error}); make one with `smol classifier`"
            ) from None


def train(
    texts: Sequence[str],
    labels: Sequence[float],
    settings: Settings,
    threshold: float,
    seed: int = 0,
    folds: int = 1,
) -> Classifier:
    """Fit and judge on documents that the fit did not see. Raises DataError when the labels cannot teach anything.

    folds 1: nine tenths teach, a tenth judges. folds n: every document is judged once, by a fit on the other parts, and
    the classifier itself learns from all; for a narrow interval from few labels.
    """
    target = _checked(labels, settings)
    features = _shared(settings)
    started = perf_counter()
    rows = features(texts)
    seconds = perf_counter() - started
    if settings.encoder is not None:  # what it was, for those who load it
        settings = replace(settings, pooling=features.encoder.pooling)
    order = np.random.default_rng(seed).permutation(len(texts))
    held_out = np.array_split(order, folds) if folds > 1 else [order[: max(10, int(_HELD_OUT * len(texts)))]]
    lengths = np.log1p([[len(text)] for text in texts])
    outputs, by_length = [], []
    for held in held_out:
        rest = np.setdiff1d(order, held)
        fitted = fit(rows[rest], target[rest], settings.kind)
        outputs.append(fitted.outputs(rows[held]))
        by_length.append(length_alone(lengths[rest], target[rest], lengths[held]))
    if folds > 1:
        fitted = fit(rows, target, settings.kind)
    judged = np.concatenate(held_out)
    report = judge(
        target[judged], scores_of(np.concatenate(outputs), settings.kind), np.concatenate(by_length),
        MOST[settings.kind], threshold,
    )  # fmt: skip
    learned = len(texts) - (len(judged) if folds == 1 else 0)
    report |= {"documents": learned, "folds": folds, "penalty": fitted.penalty}
    report["documents_per_second"] = len(texts) / max(seconds, 1e-9)
    return Classifier(settings, fitted.weights, fitted.bias, report)


def _checked(labels: Sequence[float], settings: Settings) -> NDArray[np.float64]:
    target = np.asarray(labels, np.float64)
    if len(target) < 50 or len(set(np.round(target))) < 2:
        raise DataError(
            f"{len(target)} labelled documents with {len(set(np.round(target)))} different scores cannot train a classifier: "
            "at least 50, and two scores"
        )
    most = MOST[settings.kind]
    if target.min() < 0 or target.max() > most or (settings.kind == "binary" and set(target) != {0, 1}):
        raise DataError(
            f"labels of a {settings.kind} classifier are {'0 and 1' if most == 1 else f'between 0 and {most}'}, found "
            f"{target.min():g} to {target.max():g}"
        )
    return target
