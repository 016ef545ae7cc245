"""`smol status RUN`: where a run stands, from its files, while it trains or long after.

Reads plan.json, ledger.json, the names of checkpoints, legs.jsonl, incidents.jsonl, and of metrics.jsonl only its end and a fixed number of
places in between, so that millions of lines cost as much as a thousand. Writes nothing, takes no lock. Slurm is asked
for the job's state when the run knows its job.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_smol.checkpoint.folder import COMPLETE, Checkpoint, list_checkpoints
from megatron_smol.errors import UserError
from megatron_smol.slurm import clients
from megatron_smol.slurm.legs import LEGS, last_rows
from megatron_smol.slurm.submit import SUBMISSIONS
from megatron_smol.train.incidents import INCIDENTS
from megatron_smol.train.signals import STOP_FILE

RECENT_ROWS = 50
SAMPLES = 64
SAMPLE_BYTES = 1 << 13
INCIDENT_BYTES = 1 << 24  # rows with the documents of a large batch have some 100 kB
HELD = "HELD"
# A run is silent when nothing was written for so long: ten steps, at least two minutes.
SILENT_STEPS, SILENT_SECONDS = 10, 120.0


@dataclass(frozen=True)
class Status:
    """All times in seconds, ages relative to now; None is "not known"."""

    run: str
    state: str
    job: str | None
    stage: str | None
    step: int
    steps_done: int
    steps_total: int
    progress: float
    tokens: int
    tokens_per_second: float | None
    eta_seconds: float | None
    last_step_age: float | None
    checkpoint: str | None
    checkpoint_age: float | None
    restarts: int
    goodput: float | None
    last_incident: str | None
    incidents: int
    hangs: int
    lost_ranks: int
    stragglers: list[str]
    skipped_tokens: int


def status(run: Path) -> Status:
    """UserError when the folder holds no run."""
    plan = _plan(run)
    metrics = run / "metrics.jsonl"
    recent = last_rows(metrics, 1 << 16)[-RECENT_ROWS:]
    published = list_checkpoints(run / "checkpoints")
    newest = published[-1] if published else None
    legs = last_rows(run / LEGS)
    where = _where(plan, recent, newest)
    total = plan["run"]["steps"]
    done = _steps_done(plan, *where)
    finished = done == total and newest is not None and newest.progress == where
    speed = _tokens_per_second(recent)
    age = _age(metrics)
    job = _job(run, legs)
    goodput = _goodput(run, metrics, legs, done)
    left = _seconds_left(plan, where, speed)
    incidents = last_rows(run / INCIDENTS, INCIDENT_BYTES)
    slow = {
        f"rank {row['rank']} on {row['host']}": None for row in incidents if row.get("what") == "straggler"
    }
    return Status(
        run=str(run),
        state=_state(finished, job, age, recent, run),
        job=job,
        stage=plan["stages"][where[0]]["name"],
        step=where[1],
        steps_done=done,
        steps_total=total,
        progress=done / total,
        tokens=recent[-1]["tokens"] if recent else int(newest.state["tokens"]) if newest else 0,
        tokens_per_second=speed,
        eta_seconds=0.0 if finished else left,
        last_step_age=age,
        checkpoint=newest.path.name if newest else None,
        checkpoint_age=_age(newest.path / COMPLETE) if newest else None,
        restarts=max(sum(leg.get("event") == "start" for leg in legs) - 1, 0),
        goodput=goodput,
        last_incident=_last_incident(incidents, legs),
        incidents=len(incidents),
        hangs=sum(str(row.get("what")).startswith("hang") for row in incidents),
        lost_ranks=sum(row.get("what") == "lost rank" for row in incidents),
        stragglers=list(slow),
        skipped_tokens=_skipped_tokens(run),
    )


def _plan(run: Path) -> dict[str, Any]:
    try:
        plan = json.loads((run / "plan.json").read_text())
        plan["run"]["steps"], plan["stages"][0]["end_step"]
    except FileNotFoundError:
        what = (
            "was submitted and has not started"
            if (run / SUBMISSIONS).is_file()
            else "holds no run (no plan.json)"
        )
        raise UserError(f"{run} {what}; give a run folder such as runs/demo") from None
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise UserError(f"{run / 'plan.json'} cannot be read ({type(error).__name__}: {error})") from None
    return dict(plan)


def _where(plan: dict[str, Any], recent: list[dict[str, Any]], newest: Checkpoint | None) -> tuple[int, int]:
    """(stage index, lineage step): of the last step logged, else of the newest checkpoint."""
    if recent:
        return recent[-1]["stage_index"], recent[-1]["step"]
    return newest.progress if newest else (0, 0)


def _steps_done(plan: dict[str, Any], stage_index: int, step: int) -> int:
    stages = plan["stages"]
    before = sum(stage["steps"] for stage in stages[:stage_index])
    return int(before + max(0, step - stages[stage_index]["start_step"]))


def _tokens_per_second(recent: list[dict[str, Any]]) -> float | None:
    speeds = [row["tokens_per_s"] for row in recent]
    return statistics.median(speeds) if speeds else None


def _seconds_left(plan: dict[str, Any], where: tuple[int, int], speed: float | None) -> float | None:
    if not speed:
        return None
    index, step = where
    here = plan["stages"][index]
    tokens = (here["end_step"] - step) * here["tokens_per_step"]
    tokens += sum(stage["tokens"] for stage in plan["stages"][index + 1 :])
    return float(tokens / speed)


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None


def _job(run: Path, legs: list[dict[str, Any]]) -> str | None:
    """The job that last started here, or else was last submitted."""
    rows = [*last_rows(run / SUBMISSIONS), *(leg for leg in legs if leg.get("event") == "start")]
    return max(rows, key=lambda row: row["at"])["job"] if rows else None


def _state(
    finished: bool, job: str | None, age: float | None, recent: list[dict[str, Any]], run: Path
) -> str:
    """One word, from Slurm where it knows the job, else from how long ago a step was written."""
    if finished:
        return "finished"
    slurm = _slurm_state(job)
    if slurm == HELD:
        return f"held by Slurm (scontrol release {job})"
    if slurm in ("PENDING", "REQUEUED", "SUSPENDED", "CONFIGURING"):
        return slurm.lower()
    if slurm and slurm not in ("RUNNING", "COMPLETING"):
        return f"stopped ({slurm.lower()})"
    slow = (
        max(SILENT_STEPS * statistics.median(row["seconds"] for row in recent), SILENT_SECONDS)
        if recent
        else 0.0
    )
    if age is None or age > slow:
        return "silent" if slurm else "stopped"
    return "stopping" if (run / STOP_FILE).exists() else "training"


def _slurm_state(job: str | None) -> str | None:
    if job is None or shutil.which("scontrol") is None:
        return None
    try:
        facts = clients.job(job)
        return HELD if clients.is_held(facts) else facts["JobState"]
    except (UserError, KeyError):
        return None


def _goodput(run: Path, metrics: Path, legs: list[dict[str, Any]], done: int) -> float | None:
    """Steps kept times seconds a step, over the wall time since the first leg began.

    Seconds a step: the mean of rows at SAMPLES places of metrics.jsonl, evenly spread.
    """
    first = _first_row(run / LEGS)
    seconds = _mean_seconds(metrics)
    if first is None or seconds is None:
        return None
    end = metrics.stat().st_mtime
    wall = end - first["at"]
    return min(done * seconds / wall, 1.0) if wall > 0 else None


def _first_row(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            return dict(json.loads(file.readline()))
    except (FileNotFoundError, ValueError):
        return None


def _mean_seconds(metrics: Path) -> float | None:
    seconds: list[float] = []
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            whole = size <= SAMPLES * SAMPLE_BYTES
            for place in range(1 if whole else SAMPLES):
                file.seek(0 if whole else size * place // SAMPLES)
                lines = file.read(size if whole else SAMPLE_BYTES).split(b"\n")
                for line in lines[0 if whole or not place else 1 : -1]:  # whole lines only
                    seconds.append(json.loads(line)["seconds"])
    except (FileNotFoundError, ValueError, KeyError):
        return statistics.fmean(seconds) if seconds else None
    return statistics.fmean(seconds) if seconds else None


def _skipped_tokens(run: Path) -> int:
    """Read and not applied, by the ledger as it was last saved."""
    try:
        return int(json.loads((run / "ledger.json").read_text()).get("skipped_tokens", 0))
    except (OSError, ValueError, AttributeError):
        return 0


def _last_incident(incidents: list[dict[str, Any]], legs: list[dict[str, Any]]) -> str | None:
    """The last row of incidents.jsonl, or the last leg that did not end by itself."""
    ends = [leg for leg in legs if leg.get("event") == "end" and leg.get("action") != "done"]
    rows = [*incidents[-1:], *ends[-1:]]
    if not rows:
        return None
    last = max(rows, key=lambda row: row.get("at", 0.0))
    return str(last.get("reason") or json.dumps(last))


def to_json(found: Status) -> dict[str, Any]:
    return asdict(found)
