"""Everything a report shows of training, read from a run folder into plain data.

The first half of `smol report`: run folder -> `RunRecord` -> charts and page (`charts`, `render`). A run
may still be training, or may have been killed: whatever is absent is listed in `missing`, and the rest is
used. A branch starts inside an earlier stage, so positions are tokens along a stage's lineage, and what a
model has read is added up along its lineage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_smol.errors import DataError, UserError
from megatron_smol.report.metrics import MetricsFile, Series, no_steps

FILES = {
    "plan.json": "the plan: stage boundaries, planned windows, epochs and caps",
    "metrics.jsonl": "losses, learning rates and throughput",
    "validation.jsonl": "validation loss per source",
    "ledger.json": "the ledger of tokens per source (written with the first checkpoint)",
    "recipe.yaml": "the resolved recipe",
    "versions.json": "versions of the software",
    "samples.json": "generated samples",
}


@dataclass
class StageRun:
    """A stage as it was planned and as it ran."""

    name: str
    index: int
    parent: str | None = None
    is_branch: bool = False
    start_step: int = 0
    end_step: int | None = None  # None: no plan says where it ends
    start_tokens: int = 0
    end_tokens: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # seq_length, global_batch, rope_base, precision
    planned: dict[str, dict[str, Any]] = field(default_factory=dict)  # source -> weight, windows, ...
    series: Series = field(default_factory=no_steps)
    drawn: dict[str, int] = field(default_factory=dict)  # source -> windows, over the whole stage
    validation: dict[str, dict[str, float]] = field(default_factory=dict)  # "start"/"end" -> source -> loss

    @property
    def seq_length(self) -> int:
        return int(self.settings.get("seq_length", 0))

    @property
    def begun(self) -> bool:
        return len(self.series) > 0

    @property
    def complete(self) -> bool:
        return self.begun and int(self.series.step[-1]) == self.end_step

    @property
    def last_tokens(self) -> int:
        return int(self.series.tokens[-1]) if self.begun else self.start_tokens

    @property
    def seconds(self) -> float:
        return float(self.series.seconds.sum())

    @property
    def tokens_read(self) -> int:
        return sum(self.drawn.values()) * self.seq_length

    @property
    def agrees_with_plan(self) -> bool | None:
        """Whether every source gave exactly the planned windows; None while that cannot be said."""
        if not self.complete or not self.planned:
            return None
        wanted = {name: source["windows"] for name, source in self.planned.items() if source["windows"]}
        return wanted == {name: windows for name, windows in self.drawn.items() if windows}


@dataclass
class SourceUse:
    """What a run took from one source."""

    name: str
    tokens_on_disk: int | None
    tokens_per_epoch: int | None
    tokens_read: int  # by all stages, branches included
    epochs: float | None  # the most of any lineage
    planned_epochs: float | None
    max_epochs: float | None

    @property
    def over_cap(self) -> bool:
        return self.max_epochs is not None and (self.epochs or 0.0) > self.max_epochs


@dataclass
class RunRecord:
    """A run folder's content."""

    folder: Path
    name: str
    parameters: int | None
    stages: list[StageRun]
    sources: list[SourceUse]
    problems: list[dict[str, str]]
    samples: list[dict[str, str]]
    versions: dict[str, str]
    recipe_text: str
    ledger: dict[str, Any] | None
    missing: list[str]  # one sentence each
    label: str = ""  # the name, made unique among the runs of a page

    @property
    def begun(self) -> list[StageRun]:
        return [stage for stage in self.stages if stage.begun]

    @property
    def complete(self) -> bool:
        return bool(self.stages) and all(stage.complete for stage in self.stages)

    @property
    def source_names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def ledger_agrees(self) -> bool | None:
        """Whether ledger.json holds the tokens that the metrics add up to; None while its stage runs."""
        last = self.ledger["stages"][-1]["name"] if self.ledger and self.ledger["stages"] else None
        by_name = {stage.name: stage for stage in self.stages}
        if self.ledger is None or last not in by_name or not by_name[last].complete:
            return None
        found = {
            name: source["tokens"] for name, source in self.ledger["sources"].items() if source["tokens"]
        }
        return found == {n: t for n, t in tokens_along_lineage(by_name[last], by_name).items() if t}


def collect(run_dir: Path, metrics: MetricsFile | None = None) -> RunRecord:
    """Read a run folder. UserError when it is no run folder at all. metrics: of an earlier reading, to go on from."""
    if not run_dir.is_dir():
        raise UserError(f"there is no run folder {run_dir}; give the run_dir of a recipe that was trained")
    present = {name for name in FILES if (run_dir / name).is_file()}
    if not present & {"plan.json", "metrics.jsonl"}:
        raise UserError(f"{run_dir} is not a run folder: it has neither plan.json nor metrics.jsonl")
    missing = [f"no {name} yet: {what}" for name, what in FILES.items() if name not in present]

    plan = _read_json(run_dir / "plan.json") or {}
    stages = {
        entry["name"]: _planned_stage(index, entry) for index, entry in enumerate(plan.get("stages", []))
    }
    metrics = metrics or MetricsFile(run_dir / "metrics.jsonl")
    for name, series in metrics.read().items():
        stage = stages.get(name) or stages.setdefault(name, _unplanned_stage(metrics.first[name]))
        stage.series, stage.drawn = series, series.windows()
    for row in read_rows(run_dir / "validation.jsonl"):
        if row["stage"] in stages:
            stages[row["stage"]].validation[row["when"]] = row["losses"]
    ordered = sorted(stages.values(), key=lambda stage: stage.index)
    missing += [f"stage {stage.name} has not begun" for stage in ordered if not stage.begun]

    recipe_path = run_dir / "recipe.yaml"
    return RunRecord(
        folder=run_dir,
        name=plan.get("name", run_dir.resolve().name),
        parameters=plan.get("model", {}).get("parameters"),
        stages=ordered,
        sources=_sources(plan, ordered),
        problems=plan.get("problems", []),
        samples=_read_json(run_dir / "samples.json") or [],
        versions=_read_json(run_dir / "versions.json") or {},
        recipe_text=recipe_path.read_text(encoding="utf-8") if recipe_path.is_file() else "",
        ledger=_read_json(run_dir / "ledger.json"),
        missing=missing,
        label=plan.get("name", run_dir.resolve().name),
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, none when it is absent; a last row that a kill cut short is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is damaged: {error}; remove the line") from error


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged: {error}; remove it and write the report again") from error


def _planned_stage(index: int, entry: dict[str, Any]) -> StageRun:
    settings = ("seq_length", "global_batch", "rope_base", "precision", "document_mask", "lr_end")
    placed = ("name", "parent", "is_branch", "start_step", "end_step", "start_tokens", "end_tokens")
    return StageRun(
        index=index,
        settings={name: entry[name] for name in settings},
        planned=entry["sources"],
        **{name: entry[name] for name in placed},
    )


def _unplanned_stage(row: dict[str, Any]) -> StageRun:
    """A stage known only by its first metrics row: the plan is absent."""
    settings: dict[str, Any] = {
        name: row[name] for name in ("seq_length", "global_batch", "precision") if name in row
    }
    before = row["tokens"] - row["seq_length"] * row["global_batch"]
    return StageRun(
        row["stage"], row["stage_index"], start_step=row["step"] - 1, start_tokens=before, settings=settings
    )


def tokens_along_lineage(stage: StageRun, stages: dict[str, StageRun]) -> dict[str, int]:
    """Tokens read from each source by the model that stands at the end of `stage`."""
    total = {source: windows * stage.seq_length for source, windows in stage.drawn.items()}
    child = stage
    while child.parent is not None:
        parent = stages[child.parent]
        for source, windows in parent.series.windows(child.start_step).items():
            total[source] = total.get(source, 0) + windows * parent.seq_length
        child = parent
    return total


def _sources(plan: dict[str, Any], stages: list[StageRun]) -> list[SourceUse]:
    by_name = {stage.name: stage for stage in stages}
    lineages = [tokens_along_lineage(stage, by_name) for stage in stages if stage.begun]
    planned: dict[str, Any] = plan.get("sources", {})
    names = [*planned, *(n for n in dict.fromkeys(n for s in stages for n in s.drawn) if n not in planned)]
    uses = []
    for name in names:
        facts = planned.get(name, {})
        per_epoch = facts.get("tokens_per_epoch")
        most = max((lineage.get(name, 0) for lineage in lineages), default=0)
        uses.append(
            SourceUse(
                name=name,
                tokens_on_disk=facts.get("tokens"),
                tokens_per_epoch=per_epoch,
                tokens_read=sum(stage.drawn.get(name, 0) * stage.seq_length for stage in stages),
                epochs=most / per_epoch if per_epoch else None,
                planned_epochs=facts.get("epochs"),
                max_epochs=facts.get("max_epochs"),
            )
        )
    return uses
