"""`smol simulate`: how often to save. Goodput against the checkpoint interval, by formula and by simulation.

A run of many GPUs is interrupted after exponentially distributed times with mean M = (mean time between failures of
one GPU) / GPUs. Work since the last finished save is lost, and the way back (detect, requeue, start, load) costs R.
A save costs C. Young (1974) gives the best interval as sqrt(2 C M), Daly (2006, eq. 37) improves it for C close to
M, and Daly's eq. 20 gives the expected goodput. The simulation draws failures instead of assuming that formula; in
it a failure may also hit a save or a restart.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_smol.errors import UserError


@dataclass(frozen=True)
class Costs:
    """Seconds: mean time between interruptions of the run, one save, and the way back to training after one."""

    mtbf: float
    save: float
    back: float


@dataclass(frozen=True)
class Row:
    """Goodput (share of the wall time that ends up in kept steps) when saving every `interval` seconds of work."""

    interval: float
    expected: float
    simulated: float
    standard_error: float
    lost_per_failure: float  # seconds of work


def young(costs: Costs) -> float:
    """Best interval, seconds of work between saves, to first order."""
    return math.sqrt(2 * costs.save * costs.mtbf)


def daly(costs: Costs) -> float:
    """Best interval to higher order; the mean time between interruptions itself where saves cost twice that."""
    if costs.save >= 2 * costs.mtbf:
        return costs.mtbf
    ratio = costs.save / (2 * costs.mtbf)
    return young(costs) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - costs.save


def expected_goodput(costs: Costs, interval: float) -> float:
    """Daly's eq. 20 turned over: interval / (M e^(R/M) (e^((interval + C)/M) - 1)); 0.0 where that is too small to write."""
    m = costs.mtbf
    try:
        return interval * math.exp(-costs.back / m) / (m * math.expm1((interval + costs.save) / m))
    except OverflowError:
        return 0.0


def simulate(costs: Costs, interval: float, seed: int, failures: int = 2000, runs: int = 16) -> Row:
    """Draw `runs` histories of `failures` interruptions each.

    Between two interruptions: the way back, then pairs of (interval, save); a pair counts when it is whole.
    """
    draws = np.random.default_rng(seed).exponential(costs.mtbf, (runs, failures))
    working = np.maximum(draws - costs.back, 0.0)
    pair = interval + costs.save
    kept = np.floor(working / pair) * interval
    since_save = np.minimum(working % pair, interval)
    goodput = kept.sum(axis=1) / draws.sum(axis=1)
    return Row(
        interval,
        expected_goodput(costs, interval),
        float(goodput.mean()),
        float(goodput.std(ddof=1) / math.sqrt(runs)),
        float(since_save.mean()),
    )


def table(costs: Costs, seed: int, intervals: list[float] | None = None) -> tuple[list[Row], float]:
    """Rows around the optimum (or at `intervals`), and the best interval of the simulation itself.

    All rows see the same failures (common random numbers), so that neighbours compare.
    """
    best = max(daly(costs), 1.0)
    grid = intervals or [best * factor for factor in (1 / 8, 1 / 4, 1 / 2, 1 / 1.4, 1, 1.4, 2, 4, 8)]
    rows = [simulate(costs, interval, seed) for interval in grid]
    fine = [best * 1.05**power for power in range(-24, 25)]
    optimum = max(fine, key=lambda interval: simulate(costs, interval, seed).simulated)
    return rows, optimum


def measured_rates(path: Path) -> tuple[float, float]:
    """(bytes saved per second, bytes loaded per second) of one process, from bench/results/checkpoint.json."""
    try:
        details: dict[str, Any] = json.loads(path.read_text())["details"]
        size = float(details["bytes"]["ours"])
        save, load = (details[what]["ours_wall_seconds"]["median"] for what in ("save", "load"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what `python -m bench checkpoint` writes ({type(error).__name__}: {error}); give "
            "--save-seconds and --load-seconds instead"
        ) from None
    return size / save, size / load


def hours(text: str) -> float:
    """ "50000h", "30d", "90m", "45s" or a bare number (hours) as hours."""
    scale = {"h": 1.0, "d": 24.0, "m": 1 / 60, "s": 1 / 3600}
    unit = text[-1:].lower()
    number = text[:-1] if unit in scale else text
    try:
        value = float(number.replace(",", "").replace("_", "")) * scale.get(unit, 1.0)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"'{text}' is not a time; write 50000h, 30d, 90m or 45s")
    return value


def to_json(costs: Costs, gpus: int, rows: list[Row], optimum: float) -> dict[str, Any]:
    at = {"young": young(costs), "daly": daly(costs), "simulation": optimum}
    return {
        "gpus": gpus,
        "seconds": asdict(costs),
        "best_interval_seconds": at,
        "goodput_at_best": {name: expected_goodput(costs, interval) for name, interval in at.items()},
        "failures_per_30_days": 30 * 86400 / costs.mtbf,
        "rows": [asdict(row) for row in rows],
    }
