"""evals.jsonl: one line for each finished task of each model, with its samples beside it.

Rows are appended whole, under a lock, after the samples file is in place: jobs of several checkpoints may
write to one file, and a kill leaves finished tasks only.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_smol.data.files import write_whole
from megatron_smol.errors import UserError
from megatron_smol.report.collect import read_rows

Row = dict[str, Any]
FORMAT = 1
# A task is done when a row agrees in all of these: same weights, same questions, asked the same way.
IDENTITY = ("fingerprint", "task", "definition", "data", "limit", "chat_template", "max_length", "dtype")


def load_rows(path: Path) -> list[Row]:
    """All rows of an evals.jsonl, oldest first; [] when there is none."""
    rows = list(read_rows(path))
    for row in rows:
        if row.get("format") != FORMAT:
            raise UserError(f"{path} has rows of format {row.get('format')}, this version reads {FORMAT}")
    return rows


def find_row(rows: Iterable[Row], wanted: Row) -> Row | None:
    """The newest row that answers `wanted`'s question."""
    found = [row for row in rows if all(row.get(key) == wanted[key] for key in IDENTITY)]
    return found[-1] if found else None


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    """By task, the last row written."""
    return {row["task"]: row for row in rows}


def append_row(path: Path, row: Row) -> None:
    """Add one row; a last line that a kill left torn goes first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_samples(results: Path, row: Row, samples: list[Row]) -> str:
    """Every question with its prompt, answers and scores; returns the path relative to evals.jsonl's folder."""
    asked = hashlib.sha256(json.dumps([row[key] for key in IDENTITY]).encode()).hexdigest()[:12]
    label = row["task"].replace(":", ".").replace("/", ".")
    relative = Path("evals") / f"{row['fingerprint'][:12]}.{label}.{asked}.jsonl.gz"
    path = results.parent / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_whole(path, gzip.compress(lines.encode(), mtime=0))
    return str(relative)


def read_samples(results: Path, row: Row) -> list[Row] | None:
    """The samples of a row, None when the file is gone."""
    path = results.parent / row["samples"]
    if not path.is_file():
        return None
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
