"""`smol report`: one self-contained HTML file from a run folder.

The last box of the flow: `collect` reads the folder, `figures` draws, and this module words the numbers and
fills template.html. The page loads nothing: pictures are inline SVG, style is inline CSS, and there are no
scripts, so it can be mailed or kept beside a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from megatron_smol.report import figures, style
from megatron_smol.report.collect import RunRecord, SourceUse, StageRun, collect
from megatron_smol.report.evals import changes, collect_evals, scores
from megatron_smol.report.style import NARROW, WIDE, short
from megatron_smol.report.tail import collect_tail, curves

REPORT_NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what is in the run folder by now, and return its path."""
    run = collect(Path(run_dir))
    path = run.folder / REPORT_NAME
    aside = path.with_name(f".{REPORT_NAME}.new")
    aside.write_text(render(run), encoding="utf-8")
    return aside.replace(path)


def render(run: RunRecord) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("megatron_smol", "report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    tail, evals = collect_tail(run.folder), collect_evals(run)
    return environment.get_template("template.html").render(
        run=run,
        status=_status(run),
        tiles=_tiles(run),
        verdict=_ledger_verdict(run),
        stage_colours=style.stage_colours(run),
        source_colours=style.source_colours(run),
        training=_picture(figures.training, run) if run.begun else None,
        mixture=_picture(figures.mixture, run) if run.begun and run.sources else None,
        throughput=_picture(figures.throughput, run) if run.begun else None,
        validation=_picture(figures.validation, run) if any(s.validation for s in run.stages) else None,
        stages=[_stage_row(stage) for stage in run.stages],
        sources=[_source_row(source) for source in run.sources],
        tail=tail,
        tail_curves=_picture(curves, tail) if tail else None,
        evals=evals,
        scores=_picture(scores, evals) if evals and evals.over_tokens else None,
        changes=_picture(changes, evals) if evals and evals.changed else None,
        samples=[_sample(sample) for sample in run.samples],
    )


def _picture(draw: Callable[[Any, style.Layout], str], run: Any) -> Markup:
    """Both widths of a figure; the page's CSS shows one."""
    drawn = ((layout.name, draw(run, layout)) for layout in (WIDE, NARROW))
    return Markup("".join(f'<div class="figure {name}">{svg}</div>' for name, svg in drawn))  # our own SVG


def _status(run: RunRecord) -> tuple[str, str]:
    """A word for the page's badge, and its CSS class."""
    if run.complete:
        return "complete", "good"
    total = sum((stage.end_step or 0) - stage.start_step for stage in run.stages if stage.end_step)
    done = sum(len(stage.series) for stage in run.stages)
    return (f"{done / total:.0%} of the steps" if total else f"{done:,} steps so far"), "warn"


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
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
    if run.parameters:
        tiles.append(("parameters", short(run.parameters), f"{run.parameters:,}"))
    return tiles


def _last_losses(stage: StageRun) -> float:
    """Mean loss of the last tenth of the stage, ten steps at most: one step alone is noise."""
    count = max(1, min(10, len(stage.series) // 10))
    return sum(stage.series.loss[-count:]) / count


def _ledger_verdict(run: RunRecord) -> tuple[str, str] | None:
    """Whether the stages drew what was planned, in words, and a CSS class."""
    finished = [stage for stage in run.stages if stage.agrees_with_plan is not None]
    if not finished:
        return None
    wrong = [stage.name for stage in finished if not stage.agrees_with_plan]
    if wrong:
        return f"drawn windows differ from the plan in {', '.join(wrong)}", "bad"
    every = (
        f"all {len(finished)} stages"
        if len(finished) == len(run.stages)
        else f"the {len(finished)} finished stages"
    )
    if run.ledger_agrees is False:
        return "ledger.json and metrics.jsonl do not add up to the same tokens", "bad"
    as_well = ", and ledger.json says the same to the token" if run.ledger_agrees else ""
    return f"{every} drew exactly the planned windows from every source{as_well}", "good"


def _stage_row(stage: StageRun) -> dict[str, Any]:
    """A stage as cells of the stage table."""
    speed = median(stage.series.tokens_per_s) if stage.begun else None
    planned_steps = None if stage.end_step is None else stage.end_step - stage.start_step
    return {
        "run": stage,
        "steps": f"{len(stage.series):,}"
        + ("" if stage.complete or planned_steps is None else f" of {planned_steps:,}"),
        "from": f"{stage.start_step:,}" + (f" of {stage.parent}" if stage.is_branch else ""),
        "lr": f"{stage.series.lr[0]:.2g} → {stage.series.lr[-1]:.2g}" if stage.begun else "",
        "loss": f"{stage.series.loss[0]:.3f} → {_last_losses(stage):.3f}" if stage.begun else "",
        "speed": f"{speed:,.0f}" if speed else "",
        "time": duration(stage.seconds) if stage.begun else "",
        "shares": _shares(stage),
        "changes": _changes(stage),
    }


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
