"""legs.jsonl in the run folder: one row when a leg (a start of a job) begins, one when it ends.

Written by `leg`, read back by it to see whether restarts still help, and by `status`. A leg whose node lost power
leaves no end row; that is how one knows.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smol.checkpoint.folder import Checkpoint, list_checkpoints
from megatron_smol.recipe.plan import Plan
from megatron_smol.slurm.decide import EXIT_STOPPED

LEGS = "legs.jsonl"
TAIL_BYTES = 1 << 18


@dataclass(frozen=True)
class Position:
    """Where a run stands on disk. progress: (stage index, lineage step) of the newest published checkpoint."""

    checkpoint: Checkpoint | None
    finished: bool

    @property
    def progress(self) -> tuple[int, int]:
        return self.checkpoint.progress if self.checkpoint else (0, 0)

    @property
    def name(self) -> str:
        return self.checkpoint.path.name if self.checkpoint else "step 0 (no checkpoint yet)"


def position(plan: Plan) -> Position:
    """From the checkpoints alone; a run is finished when the end of its last stage is published."""
    published = list_checkpoints(plan.recipe.run_path / "checkpoints")
    newest = published[-1] if published else None
    last = plan.stages[-1]
    end = (last.name, last.end_step)
    return Position(newest, newest is not None and (newest.stage, newest.step) == end)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One whole line, durable; several writers do not mix (O_APPEND). A line that a full disk left torn keeps to itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = json.dumps({"at": round(time.time(), 3), **row}) + "\n"
        os.write(descriptor, (torn * "\n" + line).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_rows(path: Path, tail_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The rows in the last `tail_bytes` of a JSON-lines file; torn lines are left out. [] when there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - tail_bytes))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    return list(_parsed(lines))


def _parsed(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def lost_legs(rows: list[dict[str, Any]], job: str) -> int:
    """Starts of this job that left no end: their node was lost, and Slurm requeued the job."""
    events = [row["event"] for row in rows if row.get("job") == job and row.get("event") in ("start", "end")]
    return sum(pair == ("start", "start") for pair in itertools.pairwise(events))


def stopped_chain(rows: list[dict[str, Any]], chain: str, job: str) -> dict[str, Any] | None:
    """The end row of an array's earlier element after which a later one would find the same: no progress, the numbers, the
    data, the recipe. Not after a person's stop (71), which `touch RUN/stop` keeps up by itself."""
    own = [row for row in rows if row.get("event") == "end" and row.get("chain") == chain]
    for row in [row for row in own if row["job"] != job][-1:]:
        if row["action"] == "stop" and row.get("exit_code", EXIT_STOPPED) != EXIT_STOPPED:
            return row
    return None


def futile_legs(
    rows: list[dict[str, Any]], chain: str, progress: tuple[int, int], job: str, restart: int
) -> int:
    """How many starts of this chain in a row, up to this one (number `restart` of `job`), began at the checkpoint that
    is still the newest. A start whose row could not be written (a full disk) counts with the ones around it."""
    starts = [row for row in rows if row.get("event") == "start" and row.get("chain") == chain]
    if not starts:  # not even the first row could be written
        return restart + 1
    count, after = 0, restart + 1
    for row in reversed(starts):
        if row["job"] == job:
            count += max(0, after - row["restart"] - 1)  # rows that are missing between the two
            after = row["restart"]
        if tuple(row["progress"]) != progress:
            break
        count += 1
    return count
