"""SmolLM2's own figures (paper.yaml), as what a run is drawn beside.

Scores are turned into shares of 1, as `smol eval` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from megatron_smol.report.charts import Chart, Line

_GROUP_COLOURS = {"web": "#4269d0", "code": "#efb118", "math": "#e4572e", "textbooks": "#4aa88c"}
STAGE_MODEL = "SmolLM2-1.7B"


@cache
def tables() -> dict[str, Any]:
    """paper.yaml as it stands."""
    return dict(yaml.safe_load(files("megatron_smol.report").joinpath("paper.yaml").read_text("utf-8")))


@dataclass(frozen=True)
class Reference:
    """One of the paper's models: task of `smol eval` -> score as a share of 1."""

    name: str
    source: str
    scores: dict[str, float]


def same_task(task: str) -> str | None:
    """The paper's name of a task that `smol eval` asks as the paper did; None where it does not."""
    name: str | None = tables()["same_task"].get(task)
    return name


def stage_points(task: str) -> tuple[list[float], list[float]] | None:
    """(share of all tokens, score) after each of SmolLM2-1.7B's stages; None where the paper has none."""
    table = tables()["stage_scores"]
    scores = table["scores"].get(same_task(task))
    if scores is None:
        return None
    return [tokens / table["tokens"][-1] for tokens in table["tokens"]], [_share(score) for score in scores]


def references(tasks: list[str], instruct: bool) -> list[Reference]:
    """The paper's rows for a table of these tasks: the stages and base models, or the instruct models."""
    found = []
    if not instruct:
        table = tables()["stage_scores"]
        for number in range(len(table["tokens"])):
            its = {name: values[number] for name, values in table["scores"].items()}
            found.append(_reference(f"{STAGE_MODEL} after stage {number + 1}", table["source"], its, tasks))
    table = tables()["instruct_scores" if instruct else "base_scores"]
    for column, model in enumerate(table["models"]):
        if model.startswith("SmolLM2"):
            its = {name: values[column] for name, values in table["scores"].items()}
            found.append(_reference(model, table["source"], its, tasks))
    return [reference for reference in found if reference.scores]


def _reference(name: str, source: str, scores: dict[str, Any], tasks: list[str]) -> Reference:
    own = {task: scores.get(same_task(task) or "") for task in tasks}
    return Reference(name, source, {task: _share(score) for task, score in own.items() if score is not None})


def _share(percent: float) -> float:
    return round(percent / 100, 6)


def mixture_chart() -> Chart:
    """SmolLM2-1.7B's mixture over its 11T tokens, by kind of data."""
    stages = tables()["mixtures"]["stages"]
    x = [stage["from_tokens"] for stage in stages] + [stages[-1]["until_tokens"]]
    lines = []
    for group, colour in _GROUP_COLOURS.items():
        shares = [stage["groups"].get(group, 0.0) for stage in stages]
        y = [*shares, shares[-1]]
        lines.append(Line(group, x, y, colour, stack="paper", fill=True, stepped=True, width=0.0))
    return Chart(
        "SmolLM2-1.7B's mixture over tokens",
        lines,
        "tokens of SmolLM2-1.7B",
        "share of the tokens (%)",
        y_format="percent",
        x_range=(0.0, float(x[-1])),
        y_range=(0.0, 1.0),
        height=220,
    )


def score_tables() -> list[dict[str, Any]]:
    """The tables for people: title, source, columns, rows of text."""
    every = tables()
    stage = every["stage_scores"]
    columns = [f"stage {number + 1}" for number in range(len(stage["tokens"]))]
    found = [_table(f"{STAGE_MODEL} after each stage", stage, columns)]
    for key, title in (
        ("base_scores", "Base models"),
        ("instruct_scores", "Instruct models"),
        ("sft_scores", "SmolLM2-1.7B after SFT alone"),
        ("web_ablation", "Web ablation: 1.7B models on 350B tokens of web text"),
    ):
        found.append(_table(title, every[key], every[key]["models"]))
    return found


def _table(title: str, table: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    rows = [
        (name, ["" if v is None else f"{v:g}" for v in values]) for name, values in table["scores"].items()
    ]
    return {"title": title, "source": table["source"], "columns": columns, "rows": rows}
