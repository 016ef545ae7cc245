"""The fault table: what was done to runs under a real Slurm, how often, and what followed.

Tests add their trials; `make faults` writes them to docs/faults.md, with FAULT_TRIALS=all trials of each kind.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEAD = """# Faults done to a real run, and what followed

Written by `make faults` (tests/slurm): Slurm {slurm}'s own daemons, three nodes as namespaces of one machine with
{cores} cores, ranks on gloo, a tiny model, a checkpoint every {every} steps. Times say how long Slurm, Python and this machine
take together, not how long a cluster would. "Equal": every metrics row, every validation and the final weights are,
bit for bit, those of the run that nothing happened to.

| done to the run | trials | detected after, s | training again after, s | steps lost | what the log says | end |
|---|---|---|---|---|---|---|
"""


def trials(most: int) -> int:
    """How many a test makes: FAULT_TRIALS (default 1), at most `most`; "all" is `most`."""
    asked = os.environ.get("FAULT_TRIALS", "1")
    return most if asked == "all" else min(most, int(asked))


@dataclass(frozen=True)
class Trial:
    """Seconds from the fault to the leg's (or Slurm's) verdict and to the next leg's start; steps trained twice."""

    detected_s: float | None = None
    again_s: float | None = None
    steps_lost: int | None = None


@dataclass
class FaultTable:
    """Rows by the name of the fault, in the order they came; with a path, written after each, for what is ended early."""

    slurm: str  # version
    every: int  # steps from one checkpoint to the next
    path: Path | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, fault: str, told: str, end: str, made: list[Trial]) -> None:
        row = self.found.setdefault(fault, {"told": told, "end": end, "trials": []})
        row["trials"] += made
        if self.path:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        """Rows of an earlier run that this one did not make stay."""
        kept = path.with_suffix(".json")
        before = json.loads(kept.read_text()) if kept.is_file() else {}
        now = {
            fault: row | {"trials": [vars(trial) for trial in row["trials"]]}
            for fault, row in self.found.items()
        }
        everything = before | now
        kept.write_text(json.dumps(everything, indent=1) + "\n")
        lines = [_line(fault, row) for fault, row in everything.items()]
        cores = f"{len(os.sched_getaffinity(0))} {platform.machine()}"
        path.write_text(
            HEAD.format(slurm=self.slurm, cores=cores, every=self.every) + "\n".join(lines) + "\n"
        )


def _line(fault: str, row: dict[str, Any]) -> str:
    columns = [
        _spread([trial[name] for trial in row["trials"]]) for name in ("detected_s", "again_s", "steps_lost")
    ]
    return f"| {fault} | {len(row['trials'])} | {' | '.join(columns)} | {row['told']} | {row['end']} |"


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return (
        f"{max(known):.0f}" if len(known) == 1 else f"{statistics.median(known):.0f} (most {max(known):.0f})"
    )
