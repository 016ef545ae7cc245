"""A quality classifier: trained on annotated documents, judged on held-out ones, used by the `score` step.

FineWeb-Edu's way (`scale`): text features, frozen, and one regression output on the 0-5 scale of the annotations; the
score is rounded for the F1 figures and compared with a threshold. DCLM's way (`binary`): documents like wanted ones (1:
instructions and their answers) against any others (0: the web), one logistic output, the top tenth is kept (Li et al.
2024). Features are a Hugging Face encoder's (its first token, as Snowflake-arctic-embed-m's; FineWeb-Edu, FineMath and
Stack-Edu used such) or, without a model, hashed words and word pairs, as fastText's, which need nothing but a processor.
What it learned is a vector: it is stored as numpy arrays and JSON, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_smol.data.files import write_whole
from megatron_smol.errors import UserError

MOST = {"scale": 5, "binary": 1}  # scores go from 0 to this
_FEATURES = 1 << 18
_CHARACTERS = 20_000  # of a document that are looked at
_BATCH = 32
_HELD_OUT = 0.1
_RESAMPLES = 1000
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # kept by score, of a binary classifier; DCLM: 0.1


@dataclass(frozen=True)
class Settings:
    """encoder: a Hugging Face model, None for hashed words; penalty: of the regression; length: tokens seen."""

    encoder: str | None = None
    penalty: float = 1.0
    length: int = 512
    kind: Literal["scale", "binary"] = "scale"


class Features:
    """Texts to rows of features; the same text always gives the same row."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, texts: Sequence[str]) -> Any:
        """[texts, features], sparse or dense."""
        shown = [text[:_CHARACTERS] for text in texts]
        return self._hashed.transform(shown) if self.settings.encoder is None else self._encoded(shown)

    @cached_property
    def _hashed(self) -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(n_features=_FEATURES, ngram_range=(1, 2), alternate_sign=False)

    @cached_property
    def _encoder(self) -> Any:
        import torch
        from transformers import AutoModel, AutoTokenizer

        name = self.settings.encoder
        assert name is not None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval().to(device), device

    def _encoded(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        tokenizer, model, device = self._encoder
        rows = []
        for start in range(0, len(texts), _BATCH):
            batch = tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True,
                max_length=self.settings.length, return_tensors="pt",
            ).to(device)  # fmt: skip
            with torch.inference_mode():
                rows.append(model(**batch).last_hidden_state[:, 0].float().cpu().numpy())
        return np.concatenate(rows)


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
        return 1 / (1 + np.exp(-output)) if self.settings.kind == "binary" else np.clip(output, 0, 5)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "weights.npy.new").open("wb") as stream:
            np.save(stream, self.weights)
        (folder / "weights.npy.new").replace(folder / "weights.npy")
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
    texts: Sequence[str], labels: Sequence[float], settings: Settings, threshold: float, seed: int = 0
) -> Classifier:
    """Fit on nine tenths, judge on the rest. Raises UserError when the labels cannot teach anything."""
    target = np.asarray(labels, np.float64)
    if len(texts) < 50 or len(set(np.round(target))) < 2:
        raise UserError(
            f"{len(texts)} labelled documents with {len(set(np.round(target)))} different scores cannot train a classifier: "
            "at least 50, and two scores"
        )
    most = MOST[settings.kind]
    if target.min() < 0 or target.max() > most or (settings.kind == "binary" and set(target) != {0, 1}):
        raise UserError(
            f"labels of a {settings.kind} classifier are {'0 and 1' if most == 1 else f'between 0 and {most}'}, found "
            f"{target.min():g} to {target.max():g}"
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    held = order[: max(10, int(_HELD_OUT * len(texts)))]
    rest = order[len(held) :]
    weights, bias = _fit(settings, [texts[i] for i in rest], target[rest])
    made = Classifier(settings, weights, bias, {})
    made.report = judge(
        made, [texts[i] for i in held], target[held], [texts[i] for i in rest], target[rest], threshold
    )
    return made


def _fit(
    settings: Settings, texts: list[str], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Weights and bias. Every whole score counts alike: high ones are rare."""
    from sklearn.linear_model import LogisticRegression, Ridge

    share = {label: np.mean(np.round(target) == label) for label in set(np.round(target))}
    weight = np.array([1 / share[label] for label in np.round(target)])
    model = (
        Ridge(alpha=settings.penalty)
        if settings.kind == "scale"
        else LogisticRegression(C=1 / settings.penalty)
    )
    fitted = model.fit(_shared(settings)(texts), target, sample_weight=weight / weight.mean())
    return np.ravel(fitted.coef_).astype(np.float64), float(np.ravel(fitted.intercept_)[0])


def judge(
    made: Classifier,
    texts: list[str],
    labels: NDArray[np.float64],
    seen: list[str],
    seen_labels: NDArray[np.float64],
    threshold: float,
) -> dict[str, Any]:
    """Held-out figures: macro-F1 of the rounded scores with a bootstrap interval, and of a guess by length alone."""
    from sklearn.metrics import f1_score
    from sklearn.tree import DecisionTreeClassifier

    most = MOST[made.settings.kind]
    started = perf_counter()
    raw = made.scores(texts)
    seconds = perf_counter() - started
    truth, guess = np.round(labels).astype(int), np.round(raw).astype(int)
    draws = np.random.default_rng(0).integers(0, len(truth), (_RESAMPLES, len(truth)))
    spread = [_macro_f1(_confusion(truth[draw], guess[draw], most)) for draw in draws]
    confusion = _confusion(truth, guess, most)

    def lengths(of: list[str]) -> NDArray[np.float64]:
        return np.log1p([[len(text)] for text in of])

    by_length = DecisionTreeClassifier(max_depth=4, class_weight="balanced", random_state=0)
    by_length.fit(lengths(seen), np.round(seen_labels).astype(int))
    positive = labels >= threshold
    binary = most == 1
    cuts = (
        [float(np.quantile(raw, 1 - share)) for share in _SHARES]
        if binary
        else np.arange(0.5, most, 0.5).tolist()
    )
    return {
        "documents": len(seen), "held_out": len(texts), "documents_per_second": len(texts) / max(seconds, 1e-9),
        "macro_f1": _macro_f1(confusion),
        "macro_f1_95": [float(value) for value in np.percentile(spread, [2.5, 97.5])],
        "macro_f1_by_length_alone": _macro_f1(_confusion(truth, by_length.predict(lengths(texts)), most)),
        "confusion": confusion.tolist(),
        "thresholds": [
            {"threshold": value, "f1": float(f1_score(positive, raw >= value, zero_division=0)), "kept": float(np.mean(raw >= value))}
            for value in cuts
        ],
    }  # fmt: skip


def _confusion(truth: NDArray[np.int64], guess: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Documents [score given, score found]."""
    kinds = most + 1
    return np.bincount(truth * kinds + guess, minlength=kinds * kinds).reshape(kinds, kinds)


def _macro_f1(confusion: NDArray[np.int64]) -> float:
    """Mean F1 of the scores that were given or found at all (sklearn's definition)."""
    seen = confusion.sum(0) + confusion.sum(1)
    return float(np.mean(2 * confusion.diagonal()[seen > 0] / seen[seen > 0]))
