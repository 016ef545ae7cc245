"""What is asked: the named suites of suites.yaml, or tasks by name.

First step of `smol eval`: names -> `Suite` -> evals/tasks.py loads each `Item` with lm-eval.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_smol.errors import UserError, nearest

FOLDER = Path(__file__).parent
OURS = FOLDER / "tasks"
SUBSET = ":"  # smollm2_bbh:snarks is part snarks of the data set of smollm2_bbh


@dataclass(frozen=True)
class Item:
    """One task of a suite. `name` is lm-eval's (or ours), `subset` a part of its data set; limit in questions."""

    name: str
    subset: str | None = None
    metric: str | None = None
    limit: int | None = None

    @property
    def label(self) -> str:
        return f"{self.name}{SUBSET}{self.subset}" if self.subset else self.name


@dataclass(frozen=True)
class Suite:
    """A list of tasks with its settings; max_length in tokens; means: name -> labels it averages."""

    name: str | None
    items: list[Item]
    about: str = ""
    chat_template: bool = False
    max_length: int | None = None
    means: dict[str, list[str]] = field(default_factory=dict)


@cache
def _file() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / "suites.yaml").read_text(encoding="utf-8"))
    return content


def suite_names() -> list[str]:
    return list(_file()["suites"])


def formulation(task: str) -> str:
    """How a task of suites.yaml asks: cloze or letter, and what else decides the figure."""
    return str(_file()["tasks"].get(task, {}).get("formulation", ""))


def named_suite(name: str, limit: int | None = None) -> Suite:
    """A suite of suites.yaml; `limit` questions a task at most, where it is stricter than the suite's own."""
    suites = _file()["suites"]
    if name not in suites:
        raise UserError(f"there is no suite '{name}'; {nearest(name, suites)}")
    entry = suites[name]
    items = []
    for task in entry["tasks"]:
        own = None if task in entry.get("unlimited", []) else entry.get("limit")
        items += _items(task, min((n for n in (own, limit) if n is not None), default=None))
    return Suite(
        name=name,
        items=items,
        about=entry["about"],
        chat_template=entry.get("chat_template", False),
        max_length=entry.get("max_length"),
        means={
            mean: [item.label for part in parts for item in _items(part, None)]
            for mean, parts in entry["means"].items()
        },
    )


def listed_tasks(names: list[str], limit: int | None = None) -> Suite:
    """A suite of any tasks, ours or lm-eval's, without a name."""
    items = [item for name in names for item in _items(name, limit)]
    return Suite(name=None, items=list(dict.fromkeys(items)))


def _items(task: str, limit: int | None) -> list[Item]:
    """A task, or its parts where suites.yaml names them."""
    name, _, part = task.partition(SUBSET)
    known = _file()["tasks"].get(name, {})
    subsets, metric = known.get("subsets", []), known.get("metric")
    if not subsets:
        return [Item(task, metric=metric, limit=limit)]
    if part and part not in subsets:
        raise UserError(f"task '{name}' has no part '{part}'; {nearest(part, subsets)}")
    return [Item(name, subset, metric, limit) for subset in ([part] if part else subsets)]
