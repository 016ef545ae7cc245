"""The head of a classifier: one regression output on features, and the figures by which it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = {"scale": 5, "binary": 1}  # scores go from 0 to this
Scores = NDArray[np.float64]
_PENALTIES = {"sparse": (0.03, 0.3, 1.0), "dense": (1.0, 10.0, 100.0, 1e3, 1e4)}
_INNER = 5  # every fifth document of those that teach chooses the penalty
_RESAMPLES = 1000
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # kept by score, of a binary classifier; DCLM: 0.1


@dataclass(frozen=True)
class Fitted:
    """weights[features] and bias; penalty: of their size."""

    weights: Scores
    bias: float
    penalty: float

    def outputs(self, rows: Any) -> Scores:
        return np.asarray(rows @ self.weights).ravel() + self.bias


def scores_of(outputs: Scores, kind: str) -> Scores:
    """A probability, or clipped to the scale."""
    return 1 / (1 + np.exp(-outputs)) if kind == "binary" else np.clip(outputs, 0, MOST[kind])


def fit(rows: Any, target: Scores, kind: str) -> Fitted:
    """Of several penalties the one with the best macro-F1 on a part that is kept back (FineWeb-Edu chose its epoch so)."""
    back = np.arange(len(target)) % _INNER == 0
    taught, kept = np.flatnonzero(~back), np.flatnonzero(back)
    truth = np.round(target[kept]).astype(int)
    best = (-1.0, 1.0, 0.0, 1.0)  # macro-F1, penalty, middle, stretch
    for penalty in _PENALTIES["dense" if isinstance(rows, np.ndarray) else "sparse"]:
        outputs = _fit(rows[taught], target[taught], kind, penalty).outputs(rows[kept])
        middle, stretch = _spread(outputs, target[kept]) if kind == "scale" else (0.0, 1.0)
        guess = np.round(scores_of(middle + stretch * outputs, kind)).astype(int)
        found = macro_f1(confusion(truth, guess, MOST[kind]))
        if found > best[0]:
            best = found, penalty, middle, stretch
    _, penalty, middle, stretch = best
    made = _fit(rows, target, kind, penalty)
    return Fitted(stretch * made.weights, middle + stretch * made.bias, penalty)


def _spread(outputs: Scores, target: Scores) -> tuple[float, float]:
    """(a, b) so that a + b * outputs has the mean and the spread of the labels.

    A penalised regression gives what is between its documents too near their mean: rounded, it would hardly ever find the
    lowest and the highest score, and a threshold would not keep the share that the labels have above it.
    """
    stretch = float(np.std(target)) / max(float(np.std(outputs)), 1e-6)
    return float(np.mean(target) - stretch * np.mean(outputs)), stretch


def _fit(rows: Any, target: Scores, kind: str, penalty: float) -> Fitted:
    """Every whole score counts alike: high ones are rare. Dense features are brought to one size first."""
    from sklearn.linear_model import LogisticRegression, Ridge

    labels = np.round(target)
    share = {label: np.mean(labels == label) for label in set(labels)}
    weight = np.array([1 / share[label] for label in labels])
    mean: Any = 0.0
    size: Any = 1.0
    if isinstance(rows, np.ndarray):
        mean, size = rows.mean(0), rows.std(0) + 1e-6
        rows = (rows - mean) / size
    model = (
        Ridge(alpha=penalty) if kind == "scale" else LogisticRegression(C=1 / penalty, tol=1e-3, max_iter=300)
    )
    model.fit(rows, target, sample_weight=weight / weight.mean())
    weights = np.ravel(model.coef_).astype(np.float64) / size
    return Fitted(weights, float(np.ravel(model.intercept_)[0] - np.sum(mean * weights)), penalty)


def length_alone(seen: Scores, target: Scores, lengths: Scores) -> NDArray[np.int64]:
    """Scores guessed from lengths [documents, 1]: what any classifier must beat."""
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=4, class_weight="balanced", random_state=0)
    return np.asarray(tree.fit(seen, np.round(target).astype(int)).predict(lengths), np.int64)


def judge(
    labels: Scores, scores: Scores, by_length: NDArray[np.int64], most: int, threshold: float
) -> dict[str, Any]:
    """Of documents that taught nothing: macro-F1 of the rounded scores, of a guess by length alone and of the difference,
    with 95 % bootstrap intervals over documents; confusion; F1 and share kept at each threshold."""
    from sklearn.metrics import f1_score

    truth, guess = np.round(labels).astype(int), np.round(scores).astype(int)
    draws = np.random.default_rng(0).integers(0, len(truth), (_RESAMPLES, len(truth)))
    drawn = [
        [macro_f1(confusion(truth[draw], found[draw], most)) for found in (guess, by_length)]
        for draw in draws
    ]
    ours, lengths = np.array(drawn).T
    positive = labels >= threshold
    cuts = (
        [float(np.quantile(scores, 1 - share)) for share in _SHARES]
        if most == 1
        else np.arange(0.5, most, 0.5).tolist()
    )
    return {
        "held_out": len(labels),
        "macro_f1": macro_f1(confusion(truth, guess, most)),
        "macro_f1_95": _interval(ours),
        "macro_f1_by_length_alone": macro_f1(confusion(truth, by_length, most)),
        "macro_f1_above_length_95": _interval(ours - lengths),
        "confusion": confusion(truth, guess, most).tolist(),
        "thresholds": [
            {"threshold": value, "f1": float(f1_score(positive, scores >= value, zero_division=0)), "kept": float(np.mean(scores >= value))}
            for value in cuts
        ],
    }  # fmt: skip


def _interval(values: Scores) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def confusion(truth: NDArray[np.int64], guess: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Documents [score given, score found]."""
    kinds = most + 1
    return np.bincount(truth * kinds + guess, minlength=kinds * kinds).reshape(kinds, kinds)


def macro_f1(confused: NDArray[np.int64]) -> float:
    """Mean F1 of the scores that were given or found at all (sklearn's definition)."""
    seen = confused.sum(0) + confused.sum(1)
    return float(np.mean(2 * confused.diagonal()[seen > 0] / seen[seen > 0]))
