"""What the runs of an ablation ended with: every loss and score by arm, with errors over seeds and against the control."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_smol.ablate.config import CONTROL, Ablation
from megatron_smol.ablate.recipes import STAGE, Run
from megatron_smol.data.files import write_whole
from megatron_smol.errors import UserError
from megatron_smol.report.collect import read_rows

LOSS = "loss:"


@dataclass(frozen=True)
class Cell:
    """One metric of one arm. error: standard error of the mean over seeds, None for one seed. against_control: mean
    difference of the pairs with the same seed, its standard error, and the p value of a paired t test."""

    mean: float
    error: float | None
    values: tuple[float, ...]
    difference: float | None = None
    difference_error: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Results:
    """arms in the order of `rank_by`, best first; cells[arm][metric]; tokens and seconds of all runs of an arm."""

    rank_by: str
    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: dict[str, dict[str, Cell]]
    tokens: dict[str, int]
    seconds: dict[str, float]
    epochs: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lower_is_better(metric: str) -> bool:
    return metric.startswith(LOSS) or "perplexity" in metric or "bits_per_byte" in metric


def collect(config: Ablation, runs: Sequence[Run]) -> Results:
    """From the run folders; raises UserError when `rank_by` was not measured."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    tokens: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for run in runs:
        found.setdefault(run.arm, {})[run.seed] = _metrics(run)
        tokens[run.arm] = tokens.get(run.arm, 0) + run.stage.end_tokens - run.stage.start_tokens
        took = sum(
            row["seconds"]
            for row in read_rows(run.recipe.run_path / "metrics.jsonl")
            if row["stage"] == STAGE
        )
        seconds[run.arm] = seconds.get(run.arm, 0.0) + took
    metrics = sorted({metric for by_seed in found.values() for one in by_seed.values() for metric in one})
    if config.rank_by not in metrics:
        raise UserError(
            f"rank_by '{config.rank_by}' was not measured; there are: {', '.join(metrics) or 'none'}"
        )
    control = found.get(CONTROL)
    cells = {
        arm: {metric: _cell(by_seed, None if arm == CONTROL else control, metric) for metric in metrics}
        for arm, by_seed in found.items()
    }
    sign = 1 if lower_is_better(config.rank_by) else -1
    arms = sorted(cells, key=lambda arm: sign * cells[arm][config.rank_by].mean)
    epochs = {run.arm: run.epochs() for run in runs}
    return Results(config.rank_by, tuple(arms), tuple(metrics), cells, tokens, seconds, epochs)


def _metrics(run: Run) -> dict[str, float]:
    """Validation losses by source at the end of the run and their mean, and every evaluation of the last checkpoint."""
    folder, last = run.recipe.run_path, run.stage.end_tokens
    found: dict[str, float] = {}
    for row in read_rows(folder / "validation.jsonl"):
        if row["stage"] == STAGE and row["when"] == "end":
            found = {f"{LOSS}{name}": float(loss) for name, loss in row["losses"].items()}
    if found:
        found[f"{LOSS}mean"] = statistics.fmean(found.values())
    for row in read_rows(folder / "evals.jsonl"):
        if row.get("tokens") == last:
            for metric, measured in row["metrics"].items():
                found[f"{row['task']}:{metric}"] = float(measured["value"])
    return found


def _cell(
    by_seed: dict[int, dict[str, float]], control: dict[int, dict[str, float]] | None, metric: str
) -> Cell:
    values = tuple(own[metric] for own in by_seed.values() if metric in own)
    if not values:
        return Cell(math.nan, None, ())
    mean, error = statistics.fmean(values), _standard_error(values)
    if control is None:
        return Cell(mean, error, values)
    pairs = [
        own[metric] - control[seed][metric]
        for seed, own in by_seed.items()
        if seed in control and metric in own
    ]
    return Cell(mean, error, values, statistics.fmean(pairs), _standard_error(pairs), _paired_p(pairs))


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t test that the differences' mean is 0."""
    if len(differences) < 2 or len(set(differences)) < 2:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0).pvalue)


def write(config: Ablation, results: Results) -> None:
    write_whole(config.output / "results.json", json.dumps(results.to_json(), indent=1) + "\n")
