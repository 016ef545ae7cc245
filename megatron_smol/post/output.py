"""The folder that SFT and DPO write: whole or not a model yet, never done twice, continued after a kill.

OUTPUT/metrics.jsonl validation.jsonl tensorboard/ bad_rows.jsonl     from the first step on
OUTPUT/.work/                          tokens; removed at the end
OUTPUT/.work/start-K/                  checkpoints to resume from; each start of the command renames them to its own K
OUTPUT/config.json model.safetensors tokenizer.json ...               the model, config.json last
OUTPUT/tail.json                       what was made from what; its presence means "complete"
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_smol.checkpoint.folder import COMPLETE, describe_files, fsync, sha256, verify_files
from megatron_smol.data.files import require_folder, write_whole
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.train.lock import LOCK, RunLock, take_lock

RECORD, WORK, ASKED = "tail.json", ".work", "asked.json"
_START, _CHECKPOINT, _DAMAGED = "start-", "checkpoint-", "damaged-"


class Output:
    """One OUTPUT folder and its working files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / WORK
        self.start = self.work / f"{_START}0"  # none yet: `begin` makes it
        self._is_new = False
        self._lock: RunLock | None = None

    @property
    def complete(self) -> bool:
        return (self.folder / RECORD).is_file()

    def open(self, asked: dict[str, Any], overwrite: bool, say: Callable[[str], None] = print) -> None:
        """Make the folder for this work, or find it half done or done, and keep other processes out until it is done.

        asked: model, data and settings, as JSON can hold them. overwrite: replace what was made from others. UserError when it
        holds other work, or another job is at it.
        """
        require_folder(self.folder)
        before = self._asked_before()
        if before is None and _others(self.folder, WORK):
            raise UserError(f"{self.folder} holds other files; choose a new folder as --output")
        if before == asked and self.complete:
            self._clear_leftovers(say)
            return
        if before not in (None, asked) and not overwrite:
            raise UserError(
                f"{self.folder} was made from something else ({_difference(before, asked)}); choose another "
                "--output, or replace it with --overwrite"
            )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or take_lock(self.work, say)
        except FileNotFoundError:  # the one whom we waited for is done, and removed it
            self.open(asked, overwrite, say)
            return
        if self._asked_before() == asked:  # half done, or done by the one whom we waited for
            if self.complete:
                self._remove_work()
            return
        if before is not None:
            # A kill from here on leaves what is known as the old work, and no longer as complete.
            write_whole(self.work / ASKED, json.dumps(before, indent=1))
            (self.folder / RECORD).unlink(missing_ok=True)
            _remove([*_others(self.folder, WORK), *_others(self.work, LOCK, ASKED)])
        write_whole(self.work / ASKED, json.dumps(asked, indent=1))
        self._is_new = True

    def _clear_leftovers(self, say: Callable[[str], None]) -> None:
        """What a kill at the very end left beside the whole model; what a living process has there stays."""
        with suppress(OSError, UserError):  # nothing is there, it may not be removed, or it is in use
            self._lock = take_lock(self.work, say)
            self._remove_work()

    def _remove_work(self) -> None:
        """The lock goes last and while it is held; whoever takes a new one before the folder is gone keeps the folder."""
        _remove(_others(self.work, LOCK))
        (self.work / LOCK).unlink()
        if self._lock:
            self._lock.close()  # some network file systems do not remove what is open
        with suppress(OSError):
            self.work.rmdir()

    def undo(self) -> None:
        """Remove a folder that `open` has just made: the work could not begin."""
        if self._is_new:
            shutil.rmtree(self.folder)

    def _asked_before(self) -> dict[str, Any] | None:
        try:
            if self.complete:
                return dict(json.loads((self.folder / RECORD).read_text())["asked"])
            return dict(json.loads((self.work / ASKED).read_text()))
        except (OSError, ValueError, KeyError):
            return None

    def require(self) -> None:
        """InUseError if another start of the job has taken the folder over: nothing may be written then."""
        if self._lock:
            self._lock.require()

    # --- checkpoints of the trainer ----------------------------------------------------------------------

    def begin(self) -> None:
        """Give this start a folder of its own for what the trainer writes, with what the start before left.

        A process that was frozen in a save, and thaws when its folder was taken over, goes on writing under the old name.
        """
        self.require()
        before = sorted(self.work.glob(f"{_START}*"), key=_number)
        self.start = self.work / f"{_START}{_number(before[-1]) + 1 if before else 1}"
        if before:
            before.pop().rename(self.start)
        else:
            self.start.mkdir()
        for path in before:
            shutil.rmtree(path, ignore_errors=True)  # made anew by one that thawed

    def mark_complete(self, step: int) -> None:
        """Record size and checksum of every file of a checkpoint that is written to the end."""
        self.require()
        path = self.start / f"{_CHECKPOINT}{step}"
        names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        for name in names:
            fsync(path / name)
        write_whole(path / COMPLETE, json.dumps({"files": describe_files(path, names)}))

    def newest_checkpoint(self, warn: Any) -> Path | None:
        """The furthest checkpoint whose files are as they were written; worse ones are named and moved aside."""
        found = [
            p for p in self.start.glob(f"{_CHECKPOINT}*") if p.name.removeprefix(_CHECKPOINT).isdecimal()
        ]
        for path in sorted(found, key=_number, reverse=True):
            try:
                if not (path / COMPLETE).is_file():
                    raise CheckpointError(f"{path} was not written to the end")
                verify_files(path)
                return path
            except CheckpointError as error:
                warn(f"checkpoint passed over: {error}")
                aside = path.with_name(f"{_DAMAGED}{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return None

    # --- the end -----------------------------------------------------------------------------------------

    def publish(self, written: Path, record: dict[str, Any]) -> None:
        """Move the model's files from WORK to OUTPUT, config.json last, and clear the working files.

        Without config.json no library takes the folder for a model. A kill in between leaves the checkpoint to
        go on from.
        """
        self.require()
        asked = json.loads((self.work / ASKED).read_text())
        for path in sorted(written.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o644)  # safetensors writes for the owner alone
            fsync(path)
            path.replace(self.folder / path.name)
        fsync(self.folder)
        self.require()  # to flush a large model takes a while
        write_whole(self.folder / RECORD, json.dumps({**record, "asked": asked}, indent=1) + "\n")
        self._remove_work()


def _others(folder: Path, *names: str) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in names] if folder.is_dir() else []


def _remove(paths: list[Path]) -> None:
    """config.json first: without it no library takes what a kill leaves for a model."""
    for path in sorted(paths, key=lambda path: path.name != "config.json"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def model_identity(folder: Path) -> str:
    """SHA-256 over the model's own files: the same weights and tokenizer under another path are the same."""
    names = ("config.json", "tokenizer.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    files += sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return _together(files)


def data_identity(source: str) -> str:
    """A file by its SHA-256, a hub data set by its name."""
    path = Path(source).expanduser()
    return sha256(path) if path.is_file() else source


def _together(files: list[Path]) -> str:
    return hashlib.sha256("\n".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()


def _number(path: Path) -> int:
    """The last part of its name: a step, or which start it was."""
    return int(path.name.rpartition("-")[2])


def _difference(before: dict[str, Any], asked: dict[str, Any]) -> str:
    """The names of what differs, settings by their own."""
    names = []
    for key in sorted({*before, *asked}):
        old, new = before.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{k} {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]
        elif old != new:
            names.append(f"another {key}" if key in ("model", "data") else f"{key} {old} -> {new}")
    return ", ".join(names)
