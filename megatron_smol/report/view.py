"""One run as words and rows for the page: tiles, tables, verdicts.

`RunRecord` and what goes with it (evaluations, fine-tuning, health, hashes) -> `View` -> `render`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_smol.report import paper, style
from megatron_smol.report.charts import Chart
from megatron_smol.report.collect import RunRecord, SourceUse, StageRun, collect
from megatron_smol.report.evals import Evals, collect_evals
from megatron_smol.report.health import Health, collect_health
from megatron_smol.report.metrics import MetricsFile
from megatron_smol.report.provenance import HashedFile, Hashes, files_of
from megatron_smol.report.style import short
from megatron_smol.report.tail import TailRun, collect_tail

_SETTINGS = ("seq_length", "global_batch", "rope_base", "precision")


class RunFolder:
    """A run folder that is read again and again: what was read or hashed before is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics, self._hashes = MetricsFile(path / "metrics.jsonl"), Hashes()

    def view(self) -> View:
        """Everything about it as of now."""
        run = collect(self.path, self._metrics)
        return View(
            run,
            collect_evals(run),
            collect_tail(run.folder),
            collect_health(run),
            files_of(run, self._hashes),
        )


@dataclass
class View:
    """What the page shows of one run. Methods without arguments are read by page.html."""

    run: RunRecord
    evals: Evals | None
    tail: list[TailRun]
    health: Health
    files: list[HashedFile]
    colour: str = ""
    mixture: Chart | None = None

    @property
    def status(self) -> tuple[str, str]:
        return _status(self.run)

    @property
    def tiles(self) -> list[tuple[str, str, str]]:
        return _tiles(self.run, self.health)

    @property
    def verdict(self) -> tuple[str, str] | None:
        return _ledger_verdict(self.run)

    @property
    def stage_colours(self) -> dict[str, str]:
        return style.stage_colours(self.run)

    @property
    def source_colours(self) -> dict[str, str]:
        return style.source_colours(self.run)

    @property
    def has_validation(self) -> bool:
        return any(stage.validation for stage in self.run.stages)

    @property
    def stages(self) -> list[dict[str, Any]]:
        by_name = {stage.name: stage for stage in self.run.stages}
        return [_stage_row(stage, by_name.get(stage.parent or "")) for stage in self.run.stages]

    @property
    def sources(self) -> list[dict[str, Any]]:
        return [_source_row(source) for source in self.run.sources]

    @property
    def samples(self) -> list[dict[str, str]]:
        return [_sample(sample) for sample in self.run.samples]

    @property
    def references(self) -> list[paper.Reference]:
        return paper.references(self.evals.tasks, self.evals.instruct) if self.evals else []

    @property
    def speeds(self) -> list[dict[str, str]]:
        """Throughput, model FLOPs and MFU by stage."""
        rows = []
        for stage in self.run.begun:
            speed = float(np.median(stage.series.tokens_per_s))
            flops, mfu = self.health.flops_per_token.get(stage.name), self.health.mfu.get(stage.name)
            rows.append(
                {
                    "stage": stage.name,
                    "speed": f"{speed:,.0f}",
                    "flops": f"{flops_text(flops * speed)}" if flops else "",
                    "mfu": f"{mfu:.1%}" if mfu is not None else "–",
                }
            )
        return rows

    @property
    def goodput(self) -> str:
        health = self.health
        if health.goodput is None or health.wall_seconds is None:
            return "Goodput is not known: there is no log.txt with times."
        spent = sum(stage.seconds for stage in self.run.begun)
        return (
            f"Goodput {health.goodput:.1%}: {duration(spent)} in steps that count, of {duration(health.wall_seconds)} "
            "from the first start to the last sign of life."
        )

    @property
    def peak(self) -> str:
        if self.health.peak:
            return f"MFU against {self.health.peak} GPU(s), attention counted causally."
        device = self.health.device.split(",")[0] or "this device"
        return f"No MFU: the peak of {device} is not listed."


def _status(run: RunRecord) -> tuple[str, str]:
    """A word for the page's badge, and its CSS class."""
    if run.complete:
        return "complete", "good"
    total = sum((stage.end_step or 0) - stage.start_step for stage in run.stages if stage.end_step)
    done = sum(len(stage.series) for stage in run.stages)
    return (f"{done / total:.0%} of the steps" if total else f"{done:,} steps so far"), "warn"


def _tiles(run: RunRecord, health: Health) -> list[tuple[str, str, str]]:
    """The figures that matter: what, value, remark."""
    tiles: list[tuple[str, str, str]] = []
    trunk = [stage for stage in run.begun if not stage.is_branch]
    if trunk:
        first, last = trunk[0].series.loss, _last_losses(trunk[-1])
        tiles.append(
            (
                "training loss",
                f"{last:.3f}",
                f"{trunk[-1].name}, mean of its last steps; began at {first[0]:.2f}",
            )
        )
    if ends := [stage for stage in trunk if "end" in stage.validation]:
        losses = ends[-1].validation["end"]
        tiles.append(
            (
                "validation loss",
                f"{sum(losses.values()) / len(losses):.3f}",
                f"mean of sources after {ends[-1].name}",
            )
        )
    if run.begun:
        tokens, steps = (
            sum(stage.tokens_read for stage in run.begun),
            sum(len(stage.series) for stage in run.begun),
        )
        seconds = sum(stage.seconds for stage in run.begun)
        tiles.append(("tokens read", short(tokens), f"{tokens:,} in {steps:,} steps, branches included"))
        tiles.append(("throughput", short(tokens / seconds), "tokens per second, mean over all steps"))
        tiles.append(
            ("time in steps", duration(seconds), f"{len(run.begun)} of {len(run.stages)} stages begun")
        )
    if health.goodput is not None:
        tiles.append(("goodput", f"{health.goodput:.0%}", "of the wall time in steps that count"))
    if health.incidents:
        tiles.append(("incidents", f"{len(health.incidents):,}", "see Speed and health"))
    if run.parameters:
        tiles.append(("parameters", short(run.parameters), f"{run.parameters:,}"))
    return tiles


def _last_losses(stage: StageRun) -> float:
    """Mean loss of the last tenth of the stage, ten steps at most: one step alone is noise."""
    count = max(1, min(10, len(stage.series) // 10))
    applied = stage.series.loss[stage.series.applied & np.isfinite(stage.series.loss)]
    return float(applied[-count:].mean()) if len(applied) else float("nan")


def _ledger_verdict(run: RunRecord) -> tuple[str, str] | None:
    """Whether the stages drew what was planned, in words, and a CSS class."""
    finished = [stage for stage in run.stages if stage.agrees_with_plan is not None]
    if not finished:
        return None
    wrong = [stage.name for stage in finished if not stage.agrees_with_plan]
    if wrong:
        return f"drawn windows differ from the plan in {', '.join(wrong)}", "bad"
    if len(finished) == len(run.stages):
        every = f"all {len(finished)} stages"
    else:
        every = f"the {len(finished)} finished stages" if len(finished) > 1 else f"stage {finished[0].name}"
    if run.ledger_agrees is False:
        return "ledger.json and metrics.jsonl do not add up to the same tokens", "bad"
    as_well = ", and ledger.json says the same to the token" if run.ledger_agrees else ""
    return f"{every} drew exactly the planned windows from every source{as_well}", "good"


def _stage_row(stage: StageRun, parent: StageRun | None) -> dict[str, Any]:
    """A stage as cells of the stage table."""
    planned_steps = None if stage.end_step is None else stage.end_step - stage.start_step
    return {
        "run": stage,
        "steps": f"{len(stage.series):,}"
        + ("" if stage.complete or planned_steps is None else f" of {planned_steps:,}"),
        "from": f"{stage.start_step:,}" + (f" of {stage.parent}" if stage.is_branch else ""),
        "settings": [_setting(stage, parent, name) for name in _SETTINGS],
        "lr": f"{stage.series.lr[0]:.2g} → {stage.series.lr[-1]:.2g}" if stage.begun else "",
        "loss": f"{stage.series.loss[0]:.3f} → {_last_losses(stage):.3f}" if stage.begun else "",
        "time": duration(stage.seconds) if stage.begun else "",
        "shares": _shares(stage),
        "changes": _changes(stage),
    }


def _setting(stage: StageRun, parent: StageRun | None, name: str) -> dict[str, Any]:
    value = stage.settings.get(name)
    before = parent.settings.get(name) if parent else value
    return {"value": _setting_text(value), "changed": value != before, "before": _setting_text(before)}


def _setting_text(value: Any) -> str:
    if isinstance(value, float):
        return short(value)
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _shares(stage: StageRun) -> list[dict[str, Any]]:
    """Planned against drawn for each source of the stage."""
    total = sum(stage.drawn.values())
    names = [*stage.planned, *(name for name in stage.drawn if name not in stage.planned)]
    return [
        {
            "source": name,
            "weight": stage.planned.get(name, {}).get("weight"),
            "planned": stage.planned.get(name, {}).get("windows"),
            "drawn": stage.drawn.get(name, 0),
            "share": stage.drawn.get(name, 0) / total if total else None,
        }
        for name in names
    ]


def _changes(stage: StageRun) -> dict[str, dict[str, float | None]]:
    """Validation loss of each source before and after the stage."""
    before, after = stage.validation.get("start", {}), stage.validation.get("end", {})
    changes: dict[str, dict[str, float | None]] = {}
    for name in {**before, **after}:
        both = name in before and name in after
        changes[name] = {
            "before": before.get(name),
            "after": after.get(name),
            "change": after[name] - before[name] if both else None,
        }
    return changes


def _source_row(source: SourceUse) -> dict[str, Any]:
    """A source with the geometry of its bar: epochs read against the cap."""
    cap, epochs = source.max_epochs, source.epochs or 0.0
    span = max(cap or 0.0, epochs, source.planned_epochs or 0.0) or 1.0
    return {"use": source, "filled": 100 * epochs / span, "cap_at": None if cap is None else 100 * cap / span}


def _sample(sample: dict[str, str]) -> dict[str, str]:
    """A sample whose text does not repeat its prompt."""
    prompt, text = sample.get("prompt", ""), sample.get("text", "")
    return {
        "label": sample.get("stage") or sample.get("model") or "",
        "prompt": prompt,
        "text": text.removeprefix(prompt),
    }


def duration(seconds: float) -> str:
    """Two units at most: 48 s, 3 min 20 s, 5 h 12 min, 12 d 3 h."""
    whole = round(seconds)
    for unit, size, below, below_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            rest = whole % size // below_size
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"


def flops_text(flops: float) -> str:
    """FLOP/s with a decimal scale."""
    for scale, unit in ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s")):
        if flops >= scale:
            return f"{flops / scale:.3g} {unit}"
    return f"{flops:.3g} FLOP/s"
