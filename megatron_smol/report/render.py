"""`smol report`: one self-contained HTML file from one run folder or several.

The last box of the flow: `view` words the numbers of each run, `training`, `scores` and `tail` make the charts, and
this module fills page.html. The page loads nothing: data, style, uPlot (folder uplot/, MIT licence) and page.js are in
it, so it can be mailed or kept beside a checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson
import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from megatron_smol.data.files import write_whole
from megatron_smol.errors import UserError
from megatron_smol.report import paper, training
from megatron_smol.report.ablation import AblationTable, is_ablation, read_ablation
from megatron_smol.report.charts import Chart
from megatron_smol.report.scores import score_charts
from megatron_smol.report.style import short
from megatron_smol.report.tail import curves
from megatron_smol.report.view import RunFolder, View

REPORT_NAME = "report.html"
COMPARISON_NAME = "comparison.html"


class Report:
    """A page about run folders and ablations that can be written again as they grow."""

    def __init__(self, folders: Sequence[Path], output: Path | None = None) -> None:
        """Raises UserError when a folder is given twice, or when the output's folder does not exist."""
        twice = [folder for folder, count in Counter(f.resolve() for f in folders).items() if count > 1]
        if twice:
            raise UserError(f"{twice[0]} is given twice; name every run once")
        self._ablations = [folder for folder in folders if is_ablation(folder)]
        self._runs = [RunFolder(folder) for folder in folders if folder not in self._ablations]
        alone = [*(run.path for run in self._runs), *self._ablations]
        beside = alone[0] / REPORT_NAME if len(self._runs) == 1 or len(alone) == 1 else Path(COMPARISON_NAME)
        self.path = output or beside
        if output is not None and not output.parent.is_dir():
            raise UserError(f"there is no folder {output.parent} for --output; make it, or write elsewhere")
        self._folders = [str(folder) for folder in folders]

    def write(self, every: float | None = None) -> bool:
        """Write the page from what is there by now; returns whether all runs are complete.

        every: seconds after which the page looks at itself again.
        """
        views = [run.view() for run in self._runs]
        ablations = [read_ablation(folder) for folder in self._ablations]
        complete = all(view.run.complete for view in views)
        page = render(views, ablations, self._folders, None if complete else every)
        try:
            write_whole(self.path, page)
        except OSError as error:
            raise UserError(f"the page cannot be written to {self.path}: {error.strerror}") from error
        return complete


def render(
    views: list[View], ablations: list[AblationTable], folders: list[str], every: float | None = None
) -> str:
    """The page as text."""
    _label(views)
    runs, health = [view.run for view in views], [view.health for view in views]
    for number, view in enumerate(views):
        view.colour = training.RUN_COLOURS[number % len(training.RUN_COLOURS)]
        if view.run.begun and view.run.sources:
            view.mixture = training.mixture(view.run, sync=len(views) == 1)
    begun = any(run.begun for run in runs)
    return _environment().get_template("page.html").render(
        title=" · ".join(view.run.label for view in views) or ablations[0].name,
        views=views,
        several=len(views) > 1,
        every=every,
        differences=_differences(views) if len(views) > 1 else [],
        training={
            "loss": training.loss(runs, health),
            "lr": training.learning_rate(runs),
            "gradients": training.gradient_norm(runs, health),
            "throughput": training.throughput(runs),
            "mfu": training.mfu(runs, health),
        }
        if begun
        else None,
        incidents=sum(len(one.incidents) for one in health),
        validation=training.validation(runs),
        scores=score_charts(runs, [view.evals for view in views]),
        has_evals=any(view.evals for view in views),
        ablations=ablations,
        tail_curves=curves(
            [(view.run.label if len(views) > 1 else "", view.colour, view.tail) for view in views]
        ),
        has_samples=any(view.samples for view in views),
        paper=paper.tables(),
        paper_mixture=paper.mixture_chart(),
        paper_tables=paper.score_tables(),
        folders=" ".join(folders),
        css=_asset("uplot/uPlot.min.css") + Markup("\n") + _asset("page.css"),
        uplot=Markup("/*\n{}*/\n{}").format(_asset("uplot/LICENSE"), _asset("uplot/uPlot.iife.min.js")),
        js=_asset("page.js"),
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("megatron_smol", "report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    environment.filters["data"] = _data
    return environment


def _asset(name: str) -> Markup:
    return Markup(files("megatron_smol.report").joinpath(name).read_text("utf-8"))  # our own and uPlot's


def _data(chart: Chart) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = orjson.dumps(chart.to_json()).decode()
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _label(views: list[View]) -> None:
    """Runs of one name are told apart by their folders."""
    names = Counter(view.run.name for view in views)
    for view in views:
        if names[view.run.name] > 1:
            view.run.label = str(view.run.folder)


def _differences(views: list[View]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the resolved recipes, where they are not all the same."""
    flat = [
        _flat(yaml.safe_load(view.run.recipe_text) or {}) if view.run.recipe_text else {} for view in views
    ]
    settings = dict.fromkeys(setting for one in flat for setting in one)
    rows = [(setting, [one.get(setting, "–") for one in flat]) for setting in settings]
    return [(setting, values) for setting, values in rows if len(set(values)) > 1]


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """{"a.b": "1"}; stages by their names."""
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        value = {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in value}
    if not isinstance(value, dict):
        return {path: value if isinstance(value, str) else json.dumps(value)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{path}.{key}" if path else str(key))
    return found
