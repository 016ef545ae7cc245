"""Answers of a language model on the disk, one JSON line each, under the key of their request; `endpoint` uses it.

Lines are appended whole and flushed to the disk; what a kill left of the last line is cut off. Retries and failures
are lines too, so that totals are those of all runs together. In memory: key and place of each answer, not its text.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import IO, Any, cast

import orjson

from megatron_smol.data.files import explained_disk_errors, flush_to_disk
from megatron_smol.errors import DataError, UserError
from megatron_smol.flock import flock


class AnswerFile:
    """A file of answers that one process has open. Raises UserError while another one has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> (offset, length) in bytes
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            if not flock(cast(IO[str], self._file)):
                raise UserError(f"another process is writing {path}; wait for it, or stop it")
            self._read()
        except BaseException:
            self._file.close()
            raise

    def find(self, key: bytes) -> dict[str, Any] | None:
        with self._lock:
            if (place := self._places.get(key)) is None:
                return None
            self._file.seek(place[0])
            return dict(orjson.loads(self._file.read(place[1]))["answer"])

    def add(self, key: bytes, answer: dict[str, Any]) -> None:
        self._append({"key": key.hex(), "answer": answer})

    def note(self, kind: str, reason: str) -> None:
        """kind: "retried" or "failed"."""
        self._append({kind: reason})

    def close(self) -> None:
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = orjson.dumps(record) + b"\n"
        with self._lock, explained_disk_errors(self.path, len(line)):
            offset = self._file.seek(0, 2)
            self._file.write(line)
            flush_to_disk(self._file)
            self._take(record, offset, len(line))

    def _take(self, record: dict[str, Any], offset: int, length: int) -> None:
        if "key" in record:
            self._places[bytes.fromhex(record["key"])] = offset, length
            self.sums["answers"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.sums[name] += record["answer"][name]
        else:
            for kind, counts in (("retried", self.retried), ("failed", self.failed)):
                if kind in record:
                    counts[record[kind]] += 1

    def _read(self) -> None:
        self._file.seek(0)
        offset = 0
        for line in self._file:
            if not line.endswith(b"\n"):  # cut short by a kill
                self._file.truncate(offset)
                break
            try:
                self._take(orjson.loads(line), offset, len(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path} is damaged at byte {offset:,} ({error}); remove that line, its answer is asked for again"
                ) from None
            offset += len(line)
