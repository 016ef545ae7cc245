"""What a leg reads in the run folder, asked with patience: its file system may be full, or away for a while."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_smol.errors import DiskError, UserError, is_away
from megatron_smol.recipe.plan import Plan
from megatron_smol.slurm import legs, preflight
from megatron_smol.train.signals import STOP_FILE

# Starts that find a full disk would use up FUTILE_LEGS in seconds; the person or the clean-up that helps needs minutes.
ROOM_SECONDS = 600
POLL_SECONDS = 5

T = TypeVar("T")


@dataclass
class RunFolder:
    """The run folder of a plan. say: tells a person; hurried: whether a signal came, and so nothing is waited for."""

    plan: Plan
    say: Callable[[str], None]
    hurried: Callable[[], bool]

    @property
    def path(self) -> Path:
        return self.plan.recipe.run_path

    def require(self, trained_before: Callable[[], bool]) -> None:
        """DiskError where a start after the first would begin at step 0, because the folder's disk is not mounted, say."""

        def look() -> None:
            try:
                self.path.stat()
            except FileNotFoundError:
                if trained_before():
                    raise DiskError(
                        f"{self.path}, in which this job trained before, is not there; is its file system mounted on "
                        f"{os.uname().nodename}? A new job would start from step 0"
                    ) from None

        self._read(look)

    def require_checkpoints(self, chain: str) -> None:
        """DiskError where the folder is there and they are gone."""

        def look() -> None:
            rows = legs.last_rows(self.path / legs.LEGS)
            reached = max((row["progress"] for row in rows if row.get("chain") == chain), default=[0, 0])
            if reached > [0, 0] and legs.position(self.plan).checkpoint is None:
                raise DiskError(
                    f"{self.path / 'checkpoints'} has no checkpoint, and this job was at step {reached[1]} of stage "
                    f"{reached[0] + 1}; bring it back. A new job would start from step 0"
                )

        self._read(look)

    def position(self) -> legs.Position:
        return self._read(lambda: legs.position(self.plan))

    def rows(self, path: Path, tail_bytes: int = legs.TAIL_BYTES) -> list[dict[str, Any]]:
        return self._read(lambda: legs.last_rows(path, tail_bytes))

    def stop_file(self) -> str:
        """Its path, or "" where there is none."""
        path = self.path / STOP_FILE
        try:
            self._read(path.stat)
        except FileNotFoundError:
            return ""
        return str(path)

    def wait_for_room(self) -> None:
        """Until the next checkpoints fit, or patience ends: then the preflight says what is missing."""

        def look() -> None:
            free, needed = preflight.free_bytes(self.path), preflight.room_needed(self.plan.recipe)
            if free < needed:
                raise DiskError(
                    f"{self.path} has {free / 1e6:,.1f} MB free, the next checkpoints need {needed / 1e6:,.1f} MB"
                )

        with contextlib.suppress(DiskError):
            self._read(look)

    def _read(self, what: Callable[[], T]) -> T:
        return patiently(what, self.say, self.hurried)


def patiently(what: Callable[[], T], say: Callable[[str], None], hurried: Callable[[], bool]) -> T:
    """Ask again while the file system is away or full, ROOM_SECONDS at most; then its error is raised."""
    until, told = time.monotonic() + float(os.environ.get("ROOM_SECONDS", ROOM_SECONDS)), False
    while True:
        try:
            return what()
        except (OSError, UserError) as error:
            if not is_away(error) or hurried() or time.monotonic() > until:
                raise
            if not told:
                say(f"{error}: waits, at most {until - time.monotonic():.0f} s")
                told = True
            time.sleep(POLL_SECONDS)
