"""The table of an ablation in the report, from the results.json that `smol ablate` writes into its output folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.ablate.contrast import CLEAR_P
from megatron_smol.ablate.results import RESULTS, lower_is_better
from megatron_smol.errors import DataError
from megatron_smol.recipe.units import format_tokens


@dataclass(frozen=True)
class AblationTable:
    """Arms best first. rows: (arm, cells of text, tokens, seconds); a cell is (figure, difference, class)."""

    name: str
    rank_by: str
    metrics: list[str]
    rows: list[tuple[str, list[tuple[str, str, str]], str, str]]


def is_ablation(folder: Path) -> bool:
    return (folder / RESULTS).is_file() and not (folder / "plan.json").is_file()


def read_ablation(folder: Path) -> AblationTable:
    """Raises DataError when results.json is damaged."""
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rank_by = found["rank_by"]
        metrics = [rank_by, *(metric for metric in found["metrics"] if metric != rank_by)]
        rows = [
            (
                arm,
                [_cell(found["cells"][arm].get(metric), metric) for metric in metrics],
                format_tokens(found["tokens"][arm]),
                f"{found['seconds'][arm]:,.0f}",
            )
            for arm in found["arms"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); write it again with smol ablate CONFIG --results"
        ) from error
    return AblationTable(folder.resolve().name, rank_by, metrics, rows)


def _cell(cell: dict[str, Any] | None, metric: str) -> tuple[str, str, str]:
    if cell is None or cell["mean"] is None or math.isnan(cell["mean"]):
        return "", "", ""
    figure = f"{cell['mean']:.4f}" + (f" ± {cell['error']:.4f}" if cell.get("error") is not None else "")
    difference = cell.get("difference")
    if difference is None:
        return figure, "", ""
    clear = cell.get("p") is not None and cell["p"] < CLEAR_P
    better = (difference < 0) == lower_is_better(metric)
    return figure, f"{difference:+.4f}", ("good" if better else "bad") if clear else ""
