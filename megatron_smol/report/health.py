"""How well a run used its machines, and what went wrong: MFU, goodput, incidents with their documents, starts.

From versions.json, log.txt, legs.jsonl (under Slurm) and incidents.jsonl; what is absent is None or empty.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_smol.recipe.devices import Device, device_by_cuda_name
from megatron_smol.recipe.estimate import flops_per_token
from megatron_smol.recipe.schema import Model
from megatron_smol.report.collect import RunRecord, StageRun
from megatron_smol.slurm.legs import LEGS, last_rows
from megatron_smol.train.incidents import read_incidents

_EDGE_BYTES = 1 << 16
_DOCUMENTS_SHOWN = 12


@dataclass(frozen=True)
class Incident:
    """A row of incidents.jsonl. documents: (source, shard, numbers), as `smol inspect` counts them."""

    at: str  # UTC
    stage: str
    step: int
    tokens: int | None  # along the lineage, None where the step is in no known stage
    decision: str
    reason: str
    documents: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Health:
    """mfu: stage -> share of the dense bf16 peak. goodput: share of the wall time spent in steps that count."""

    device: str
    peak: str  # what MFU is measured against, "" where there is no MFU
    flops_per_token: dict[str, float]
    mfu: dict[str, float]
    wall_seconds: float | None
    goodput: float | None
    incidents: list[Incident]
    legs: list[dict[str, Any]]


def collect_health(run: RunRecord) -> Health:
    """Everything above of one run."""
    device = run.versions.get("device", "")
    ranks = int(run.versions.get("ranks", 1))
    known, flops = device_by_cuda_name(device), _flops(run)
    wall = _wall_seconds(run)
    kept = sum(stage.seconds for stage in run.begun)
    return Health(
        device=device,
        peak=f"{known.bf16_flops / 1e12:,.0f} TFLOP/s (dense bf16) on each of {ranks}" if known else "",
        flops_per_token=flops,
        mfu=_mfu(run, known, ranks, flops) if known else {},
        wall_seconds=wall,
        goodput=min(kept / wall, 1.0) if wall else None,
        incidents=[_incident(row, run) for row in read_incidents(run.folder)],
        legs=[_leg(row) for row in _legs(run) if row.get("event") == "end"],
    )


def _legs(run: RunRecord) -> list[dict[str, Any]]:
    """All of them. What a full disk or a power cut left torn is no row: `append_row` goes on behind it."""
    return last_rows(run.folder / LEGS, sys.maxsize)


def _flops(run: RunRecord) -> dict[str, float]:
    """FLOPs a token by stage, attention counted causally, as the trainer's own MFU."""
    recipe = yaml.safe_load(run.recipe_text) if run.recipe_text else None
    if not isinstance(recipe, dict) or "model" not in recipe:
        return {}
    model = Model.model_validate(recipe["model"])
    return {stage.name: flops_per_token(model, stage.seq_length) for stage in run.begun}


def _mfu(run: RunRecord, device: Device, ranks: int, flops: dict[str, float]) -> dict[str, float]:
    return {
        stage.name: flops[stage.name]
        * float(np.median(stage.series.tokens_per_s))
        / (device.bf16_flops * ranks)
        for stage in run.begun
        if stage.name in flops
    }


def _wall_seconds(run: RunRecord) -> float | None:
    """From the first start to the last sign of life: of the Slurm legs, else by the times in log.txt."""
    legs = [row["at"] for row in _legs(run)]
    metrics, log = run.folder / "metrics.jsonl", run.folder / "log.txt"
    if legs and metrics.is_file():
        return max(legs[-1], metrics.stat().st_mtime) - legs[0] or None
    if not log.is_file():
        return None
    with log.open("rb") as file:
        head = file.read(_EDGE_BYTES)
        file.seek(max(0, log.stat().st_size - _EDGE_BYTES))
        tail = file.read()
    first, last = _times(head), _times(tail)
    return last[-1] - first[0] if first and last and last[-1] > first[0] else None


def _times(text: bytes) -> list[float]:
    found = []
    for line in text.decode(errors="replace").splitlines():
        try:
            found.append(time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")))
        except ValueError:
            continue
    return found


def _incident(row: dict[str, Any], run: RunRecord) -> Incident:
    index, step = row.get("stage_index"), int(row.get("step", 0))
    stage = next((s for s in run.stages if s.index == index), None)
    documents = row.get("documents", {})
    return Incident(
        at=_utc(row["at"]) if "at" in row else "",
        stage=stage.name if stage else str(row.get("stage", "")),
        step=step,
        tokens=_tokens_at(stage, step) if stage else None,
        decision=str(row.get("decision", "")),
        reason=str(row.get("reason") or row.get("what", "")),
        documents=_documents(documents) if isinstance(documents, dict) else [("", "", str(documents))],
    )


def _documents(documents: dict[str, dict[str, list[int]]]) -> list[tuple[str, str, str]]:
    rows = []
    for source, shards in documents.items():
        for shard, numbers in shards.items():
            more = len(numbers) - _DOCUMENTS_SHOWN
            shown = ", ".join(f"{number:,}" for number in numbers[:_DOCUMENTS_SHOWN])
            rows.append((source, Path(shard).name, shown + (f" and {more:,} more" if more > 0 else "")))
    return rows


def _tokens_at(stage: StageRun, step: int) -> int | None:
    a_step = stage.seq_length * int(stage.settings.get("global_batch", 0))
    return stage.start_tokens + (step - stage.start_step) * a_step


def _leg(row: dict[str, Any]) -> dict[str, Any]:
    nodes = row.get("nodes")
    return row | {
        "ended": _utc(row["at"]),
        "nodes": len(nodes) if isinstance(nodes, list) else nodes,
    }


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
