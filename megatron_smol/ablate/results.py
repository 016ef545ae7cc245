"""What the runs of an ablation ended with: every loss and score by arm, with errors over seeds and against the control.

`write` leaves it as results.json in the output folder, for `smol report` and `smol rebalance`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from megatron_smol.ablate.config import CONTROL, Ablation
from megatron_smol.ablate.contrast import BySeed, Contrast, contrast, holm, noise_of
from megatron_smol.ablate.recipes import LOSS, STAGE, Arm, Run
from megatron_smol.data.files import write_whole
from megatron_smol.errors import UserError
from megatron_smol.report.collect import read_rows

RESULTS = "results.json"


@dataclass(frozen=True)
class Cell:
    """One metric of one arm. error: standard error of the mean over its own seeds, None for one seed. The difference to the
    control of the same budget is that of the pairs with the same seed; its error and p are those of contrast.py, p after
    Holm over the candidates of the budget."""

    mean: float
    error: float | None
    values: tuple[float, ...]
    difference: float | None = None
    difference_error: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Content:
    """What an arm was. budget in tokens; weights by source; control: the arm it is compared with."""

    candidate: str
    share: float | None
    budget: int
    weights: dict[str, float]
    control: str | None


@dataclass(frozen=True)
class Results:
    """name: of the ablation; arms by budget, then in the order of `rank_by`, best first; cells[arm][metric]; to_next[arm]: the next arm minus this
    one in `rank_by`; tokens and seconds of all runs of an arm; epochs[arm][source] at its end."""

    name: str
    rank_by: str
    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: dict[str, dict[str, Cell]]
    to_next: dict[str, Contrast | None]
    tokens: dict[str, int]
    seconds: dict[str, float]
    epochs: dict[str, dict[str, float]]
    content: dict[str, Content]
    started_from: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lower_is_better(metric: str) -> bool:
    return metric.startswith(LOSS) or "perplexity" in metric or "bits_per_byte" in metric


def collect(config: Ablation, runs: Sequence[Run]) -> Results:
    """From the run folders, of whatever is done; raises UserError when `rank_by` was not measured."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    tokens: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for run in runs:
        arm = run.arm.name
        found.setdefault(arm, {})[run.seed] = _metrics(run)
        tokens[arm] = tokens.get(arm, 0) + run.stage.tokens
        seconds[arm] = seconds.get(arm, 0.0) + _seconds(run)
    metrics = sorted({metric for by_seed in found.values() for one in by_seed.values() for metric in one})
    if config.rank_by not in metrics:
        raise UserError(
            f"rank_by '{config.rank_by}' was not measured; there are: {', '.join(metrics) or 'none'}"
        )
    content = {run.arm.name: _content(run, runs) for run in runs}
    values = {
        metric: {arm: {s: m[metric] for s, m in own.items() if metric in m} for arm, own in found.items()}
        for metric in metrics
    }
    cells: dict[str, dict[str, Cell]] = {arm: {} for arm in found}
    for metric in metrics:
        for arm, cell in _cells(values[metric], content).items():
            cells[arm][metric] = cell
    sign = 1 if lower_is_better(config.rank_by) else -1
    measured = [arm for arm in cells if values[config.rank_by][arm]]
    order = sorted(measured, key=lambda arm: (content[arm].budget, sign * cells[arm][config.rank_by].mean))
    return Results(
        config.name,
        config.rank_by,
        tuple(order),
        tuple(metrics),
        {arm: cells[arm] for arm in order},
        _to_next(order, values[config.rank_by], content),
        tokens,
        seconds,
        {run.arm.name: run.epochs() for run in runs},
        content,
        _started_from(config, runs),
    )


def _content(run: Run, runs: Iterable[Run]) -> Content:
    weights = {name: float(weight) for name, weight in run.stage.weights.items()}
    return Content(run.arm.candidate, run.arm.share, run.stage.tokens, weights, _control_of(run.arm, runs))


def _control_of(arm: Arm, runs: Iterable[Run]) -> str | None:
    same = (r.arm.name for r in runs if (r.arm.candidate, r.arm.budget) == (CONTROL, arm.budget))
    return None if arm.candidate == CONTROL else next(same, None)


def _started_from(config: Ablation, runs: Sequence[Run]) -> dict[str, Any] | None:
    if config.from_ is None:
        return None
    return {
        "run": str(config.from_.run.absolute()),
        "stage": config.from_.stage,
        "step": runs[0].stage.start_step,
    }


def _seconds(run: Run) -> float:
    rows = read_rows(run.recipe.run_path / "metrics.jsonl")
    return sum(float(row["seconds"]) for row in rows if row["stage"] == STAGE)


def _cells(values: Mapping[str, BySeed], content: Mapping[str, Content]) -> dict[str, Cell]:
    """One metric: the cell of every arm."""
    compared = {
        arm: contrast(own, values[control], noise_of(_of_budget(values, content, arm)))
        for arm, own in values.items()
        if (control := content[arm].control) is not None
    }
    by_budget: dict[int, dict[str, float]] = {}
    for arm, found in compared.items():
        if found is not None and found.p is not None:
            by_budget.setdefault(content[arm].budget, {})[arm] = found.p
    p = {arm: value for family in by_budget.values() for arm, value in holm(family).items()}
    cells = {}
    for arm, own in values.items():
        numbers, found = tuple(own.values()), compared.get(arm)
        mean = statistics.fmean(numbers) if numbers else math.nan
        against = (found.difference, found.error, p.get(arm)) if found is not None else (None, None, None)
        cells[arm] = Cell(mean, _standard_error(numbers), numbers, *against)
    return cells


def _of_budget(values: Mapping[str, BySeed], content: Mapping[str, Content], arm: str) -> dict[str, BySeed]:
    return {name: own for name, own in values.items() if content[name].budget == content[arm].budget}


def _to_next(
    order: Sequence[str], values: Mapping[str, BySeed], content: Mapping[str, Content]
) -> dict[str, Contrast | None]:
    found: dict[str, Contrast | None] = dict.fromkeys(order)
    for arm, following in pairwise(order):
        if content[arm].budget == content[following].budget:
            noise = noise_of(_of_budget(values, content, arm))
            found[arm] = contrast(values[following], values[arm], noise)
    return found


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


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def write(config: Ablation, results: Results) -> None:
    write_whole(config.output / RESULTS, json.dumps(results.to_json(), indent=1) + "\n")
