"""metrics.jsonl as columns: millions of steps in seconds, and only what is new when it is read again.

The first box of `smol report`: metrics.jsonl -> `Series` of each stage -> `collect`.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_smol.errors import DataError

BLOCK_BYTES = 4 << 20
_NUMBERS = ("step", "tokens", "loss", "lr", "grad_norm", "seconds", "tokens_per_s")
_WHOLE = ("step", "tokens")
_REMEMBERED_BYTES = 256


@dataclass(frozen=True)
class Series:
    """The completed steps of a stage, a value a step: [n] each. loss: nats per token. lr: of the step.

    applied: False where the guard left the step out; its loss may be NaN. drawn: windows by source.
    """

    step: NDArray[np.int64]
    tokens: NDArray[np.int64]  # along the lineage, after the step
    loss: NDArray[np.float64]
    lr: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    seconds: NDArray[np.float64]
    tokens_per_s: NDArray[np.float64]
    applied: NDArray[np.bool_]
    drawn: dict[str, NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.step)

    def windows(self, until_step: int | None = None) -> dict[str, int]:
        """Windows read from each source, up to and with a lineage step."""
        end = len(self) if until_step is None else int(np.searchsorted(self.step, until_step, side="right"))
        return {source: int(column[:end].sum()) for source, column in self.drawn.items()}


class MetricsFile:
    """Reads a metrics.jsonl that may still grow, or be cut back when its run resumes from a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.first: dict[str, dict[str, Any]] = {}  # stage -> its first row
        self._blocks: dict[str, list[dict[str, Any]]] = {}  # stage -> columns of a block of rows
        self._offset = self._lines = 0
        self._last = b""  # what stood before the offset: gone when the file was cut back

    def read(self) -> dict[str, Series]:
        """All steps by stage, {} without a file; a last row that a kill cut short is left out. Raises DataError."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._start_over()
                    file.seek(0)
                with _no_garbage_collection():
                    self._read_on(file)
        return {stage: _joined(blocks) for stage, blocks in self._blocks.items()}

    def _read_on(self, file: Any) -> None:
        rest = b""
        while read := file.read(BLOCK_BYTES):
            whole, newline, rest = (rest + read).rpartition(b"\n")
            if newline:
                self._add(whole.split(b"\n"))
                self._offset += len(whole) + 1
                self._last = (whole + newline)[-_REMEMBERED_BYTES:]

    def _add(self, lines: list[bytes]) -> None:
        try:
            rows = orjson.loads(b"[" + b",".join(lines) + b"]")
            groups = self._columns(rows)
        except (ValueError, KeyError, TypeError):  # NaN, which orjson refuses, or damage: row by row
            rows = [self._row(line, self._lines + number) for number, line in enumerate(lines, 1)]
            groups = self._columns(rows)
        for stage, columns, first in groups:
            self.first.setdefault(stage, first)
            self._blocks.setdefault(stage, []).append(columns)
        self._lines += len(lines)

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            wrong = [name for name in (*_NUMBERS, "drawn", "stage") if name not in row]
            if wrong:
                raise ValueError(f"it has no '{wrong[0]}'")
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path} line {number} is damaged: {error}; remove the line") from error
        return dict(row)

    @staticmethod
    def _columns(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        found = []
        for stage, group in groupby(rows, key=lambda row: row["stage"]):
            its = list(group)
            columns: dict[str, Any] = {
                name: np.array([row[name] for row in its], np.int64 if name in _WHOLE else np.float64)
                for name in _NUMBERS
            }
            columns["applied"] = np.array([row.get("applied", True) for row in its])
            drawn = [row["drawn"] for row in its]
            columns["drawn"] = {
                source: np.array([one.get(source, 0) for one in drawn], np.int32)
                for source in dict.fromkeys(source for one in drawn for source in one)
            }
            found.append((stage, columns, its[0]))
        return found


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rows hold no cycles, and looking for some among millions of objects takes half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _joined(blocks: list[dict[str, Any]]) -> Series:
    """Blocks as one; they are replaced by it, so that the next reading joins no more than what is new."""
    sources = dict.fromkeys(source for block in blocks for source in block["drawn"])
    none = [np.zeros(len(block["step"]), np.int32) for block in blocks]
    joined: dict[str, Any] = {
        name: np.concatenate([block[name] for block in blocks]) for name in (*_NUMBERS, "applied")
    }
    joined["drawn"] = {
        source: np.concatenate([b["drawn"].get(source, n) for b, n in zip(blocks, none, strict=True)])
        for source in sources
    }
    blocks[:] = [joined]
    return Series(**joined)


def no_steps() -> Series:
    """The series of a stage that has not begun."""
    empty: dict[str, Any] = {
        name: np.zeros(0, np.int64 if name in _WHOLE else np.float64) for name in _NUMBERS
    }
    return Series(**empty, applied=np.zeros(0, np.bool_), drawn={})
