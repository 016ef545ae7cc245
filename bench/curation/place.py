"""Where the bench works: its folder, the command `smol`, and what each step found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import CORES, ROOT
from megatron_smol.curate.reading import opened
from megatron_smol.data.files import write_whole
from megatron_smol.errors import RunError

_QUIET = {"HF_HUB_OFFLINE": "1", "SMOL_DEVICE": "cpu", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}  # fmt: skip
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Place:
    """packages: a folder of .deb and .whl files that are there already; benchmarks: of gsm8k_train.jsonl and
    gsm8k_test.jsonl; endpoint: of SmolLM2-135M-Instruct, in place of the model of this machine; share: of the whole bench."""

    folder: Path
    packages: Path | None = None
    benchmarks: Path | None = None
    endpoint: str | None = None
    share: float = 1.0

    def part(self, count: int, least: int = 1) -> int:
        """So many of what a whole bench takes."""
        return max(least, round(count * self.share))

    @property
    def unpacked(self) -> Path:
        return self.folder / "unpacked"

    @property
    def inputs(self) -> Path:
        return self.folder / "inputs"

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def labels(self) -> Path:
        return self.folder / "labels"

    @property
    def smollm2(self) -> Path:
        return self.models / "SmolLM2-135M-Instruct"

    @property
    def minilm(self) -> Path:
        return self.models / "all-MiniLM-L6-v2"

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "megatron_smol", *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        return (
            os.environ
            | _QUIET
            | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(CORES)), "COLUMNS": "160"}
        )

    def smol(self, *arguments: object) -> tuple[str, float]:
        """What the command said, and its seconds; the whole is kept in `logs`. RunError when it fails."""
        began = time.perf_counter()
        done = subprocess.run(
            self.command(*arguments), cwd=ROOT, env=self.environment(), capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        said = _ESCAPES.sub("", done.stdout + done.stderr)
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        name = f"{len(list(logs.iterdir())):03d}-{arguments[0]}.txt"
        (logs / name).write_text(f"smol {' '.join(map(str, arguments))}\n\n{said}")
        if done.returncode:
            raise RunError(
                f"smol {arguments[0]} ended with {done.returncode} ({logs / name}): {said[-1500:]}"
            )
        return said, seconds

    # --- what a step found: there once it has ended, so that the same command goes on where it was ended

    def found(self, step: str) -> dict[str, Any] | None:
        path = self.folder / "found" / f"{step}.json"
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def keep(self, step: str, facts: dict[str, Any]) -> None:
        (self.folder / "found").mkdir(parents=True, exist_ok=True)
        told = json.dumps(facts, indent=1).replace(f"{self.folder}/", "")  # where it lay is nobody's business
        write_whole(self.folder / "found" / f"{step}.json", told + "\n")

    def forget(self, step: str) -> None:
        (self.folder / "found" / f"{step}.json").unlink(missing_ok=True)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Of a JSONL file, or of all in a folder."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with opened(file) as stream:
            for line in stream:
                yield json.loads(line)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
