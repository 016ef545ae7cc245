"""What a checkpoint is on disk: complete or absent, described by JSON a person can read.

    checkpoints/stable-1-00000050/
        state.json       stage, step, tokens, ledger, model, layout: everything that is not a tensor
        complete.json    every file's size and checksum; written last, so its presence means "whole"
        *.distcp .metadata common.pt metadata.json     megatron-core's distributed format (torch_dist)

A save happens in `.writing-<name>-<attempt>` and is renamed into place. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_smol.errors import CheckpointError, DiskError

STATE, COMPLETE = "state.json", "complete.json"
WRITING, DAMAGED, REPLACED = ".writing-", ".damaged-", ".replaced-"
# Finds damage, not forgery: whoever can change a tensor can change complete.json, and checkpoint/safe.py is against him.
# Unlike SHA-256, no save waits for it (`python -m bench checkpoint` tells what checksums cost).
CHECKSUM = "xxh3_128"
_CHECKSUMS: dict[str, Any] = {CHECKSUM: xxhash.xxh3_128, "sha256": hashlib.sha256}  # the latter in format 1
FORMAT, _READABLE = 2, (1, 2)
_NAME = re.compile(r"[^.].*-\d{8,}")
_HASHED_AT_ONCE = 2  # files: hashing one of many does not wait for the disk


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its folder and what state.json says."""

    path: Path
    state: dict[str, Any]

    @property
    def progress(self) -> tuple[int, int]:
        """(index of the stage, lineage step): later is larger, across branches too."""
        return int(self.state["stage_index"]), int(self.state["step"])

    @property
    def stage(self) -> str:
        return str(self.state["stage"])

    @property
    def step(self) -> int:
        return int(self.state["step"])


class _OtherFormat(CheckpointError):
    """Of a later version, or damaged."""


def checkpoint_name(stage: str, step: int) -> str:
    return f"{stage}-{step:08d}"


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint by its folder, or the newest of a run's folder, with a clear word for what is neither."""
    if (path / "checkpoints").is_dir():
        published = list_checkpoints(path / "checkpoints")
        if not published:
            raise CheckpointError(f"{path} holds no published checkpoint yet; train first")
        return published[-1]
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; published ones: {_names(path.parent)}")
    if not (path / COMPLETE).is_file():
        raise CheckpointError(
            f"{path} has no {COMPLETE}, so it was not written to the end or is not a checkpoint of this "
            f"package; published ones beside it: {_names(path.parent)}"
        )
    try:
        state = json.loads((path / STATE).read_text())
        known, checkpoint = state["format"] in _READABLE, Checkpoint(path, state)
        _ = known and (checkpoint.stage, checkpoint.progress)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE} cannot be read ({error}); use another checkpoint") from error
    if not known:
        raise _OtherFormat(
            f"{path} has format {state['format']}, this version of the package reads {_READABLE}"
        )
    return checkpoint


def verify_files(path: Path) -> None:
    """Compare every file with complete.json; raises CheckpointError naming the first that differs."""
    try:
        files = {
            name: dict(entry) for name, entry in json.loads((path / COMPLETE).read_text())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / COMPLETE} cannot be read ({error})") from error
    for name, expected in files.items():
        try:
            _verify_file(path / name, expected)
        except OSError as error:  # a bad sector
            raise CheckpointError(f"{path / name} cannot be read ({error.strerror})") from error


def _verify_file(file: Path, expected: dict[str, Any]) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    found = file.stat().st_size
    if found != expected.get("bytes"):
        raise CheckpointError(f"{file} has {found} bytes, {expected.get('bytes')} were written")
    kind = next((kind for kind in _CHECKSUMS if kind in expected), None)
    if kind is None:
        raise CheckpointError(f"{COMPLETE} gives {file} no checksum that this version knows")
    if _hexdigest(file, kind) != expected[kind]:
        raise CheckpointError(
            f"{file} does not have the checksum it was written with ({kind}): its content changed"
        )


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Published checkpoints, oldest progress first; unpublished and foreign folders are skipped."""
    found = []
    for path in _published(folder):
        try:
            found.append(read_checkpoint(path))
        except CheckpointError:
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.progress)


def _published(folder: Path) -> list[Path]:
    """All that were renamed into place. One without complete.json lost it later, and is as damaged as one without tensors."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if _NAME.fullmatch(e.name) and e.is_dir())
    except FileNotFoundError:  # and nothing else: a folder that cannot be read is not an empty one
        if folder.is_symlink():
            raise DiskError(f"{folder} is a link to nowhere; is its file system mounted?") from None
        return []


def choose_newest(folder: Path, warn: Any = print) -> Checkpoint | None:
    """The furthest checkpoint whose files are as they were written, to go on from.

    Damaged ones beyond it are named and moved aside as `.damaged-NAME`, so that they neither hide nor push out
    the good ones that follow; those found damaged earlier go, so that a bad disk does not fill up with them. None when
    nothing was ever published. CheckpointError when there are checkpoints and none can be used, or one is of a later
    version of this package: starting from zero, or from before it, in silence would throw a run away.
    """
    published = _published(folder)
    damaged: list[tuple[Path, CheckpointError]] = []
    readable: list[Checkpoint] = []
    for path in published:
        try:
            readable.append(read_checkpoint(path))
        except CheckpointError as error:
            if isinstance(error, _OtherFormat) and _is_later(path):
                raise CheckpointError(f"{error}; use a later one, or move that checkpoint away") from error
            damaged.append((path, error))
    chosen = None
    for checkpoint in sorted(readable, key=lambda c: c.progress, reverse=True):
        try:
            verify_files(checkpoint.path)
        except CheckpointError as error:
            damaged.append((checkpoint.path, error))
            continue
        chosen = checkpoint
        break
    if damaged and _bring_back(folder):
        return choose_newest(folder, warn)
    if published and chosen is None:
        raise CheckpointError(
            f"none of the {len(published)} checkpoints in {folder} can be used, the first because {damaged[0][1]}; "
            "restore one, or remove the folder to start over"
        )
    for path in folder.glob(f"{DAMAGED}*") if damaged else ():
        shutil.rmtree(path, ignore_errors=True)
    for path, why in damaged:
        warn(f"damaged checkpoint passed over: {why}")
        path.rename(path.with_name(f"{DAMAGED}{path.name}"))
    return chosen


def _is_later(path: Path) -> bool:
    """Whether both of its files name the format that is not known here: a flipped bit changes one."""
    try:
        formats = {json.loads((path / name).read_text())["format"] for name in (STATE, COMPLETE)}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return len(formats) == 1


def _bring_back(folder: Path) -> bool:
    """Give those that were moved aside and are whole their names again: their disk may have been away for a moment."""
    found = False
    for path in folder.glob(f"{DAMAGED}*"):
        name = path.with_name(path.name.removeprefix(DAMAGED))
        with contextlib.suppress(CheckpointError):
            verify_files(read_checkpoint(path).path)
            if not name.exists():
                path.rename(name)
                found = True
    return found


def describe_files(path: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, for complete.json."""
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        found = dict(zip(names, pool.map(lambda name: _hexdigest(path / name, CHECKSUM), names), strict=True))
    return {n: {"bytes": (path / n).stat().st_size, CHECKSUM: found[n]} for n in sorted(names)}


def publish(writing: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
    """Mark the folder complete and rename it into place, each step durable before the next."""
    for name in files:
        fsync(writing / name)
    write_json(writing / COMPLETE, {"format": FORMAT, "files": files})
    fsync(writing)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # the same step again, after a roll-back; `remove_unfinished` knows what a kill leaves
        final.rename(replaced)
    try:
        writing.rename(final)
    except OSError:  # cleared away by a later start that took this process for dead: what it published stays
        if replaced.exists():
            replaced.rename(final)
        raise
    fsync(final.parent)
    if replaced.exists():
        discard(replaced)


def discard(path: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves what `remove_unfinished` clears, never what looks whole."""
    away = path.with_name(f"{WRITING}discarded-{path.name}")
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def prune(folder: Path, keep_last: int, keeps: Callable[[Checkpoint], bool]) -> list[Path]:
    """Remove all but the `keep_last` newest checkpoints and those that `keeps` wants; returns what went.

    Judged as they lie there now: a process that was frozen on the way here must not remove what came after.
    """
    removable = [c.path for c in list_checkpoints(folder)[:-keep_last] if not keeps(c)]
    for path in removable:
        discard(path)
    return removable


def remove_unfinished(folder: Path) -> None:
    """Clear what an interrupted save left behind; a checkpoint that it was about to replace comes back."""
    for path in folder.glob(f"{REPLACED}*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if final.exists():
            discard(path)
        else:
            path.rename(final)
    for path in folder.glob(f"{WRITING}*"):
        shutil.rmtree(path, ignore_errors=True)


def unfinished_bytes(folder: Path) -> int:
    """What `remove_unfinished` will free."""
    left = (*folder.glob(f"{WRITING}*/**/*"), *folder.glob(f"{REPLACED}*/**/*"))
    return sum(path.stat().st_size for path in left if path.is_file())


def make_folder(path: Path) -> None:
    """With its parents, each of them durable: what is flushed into a folder is lost with a folder that is not."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Who a file is, for records that others compare with theirs; damage to a checkpoint is `verify_files`' business."""
    return _hexdigest(path, "sha256")


def _hexdigest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _CHECKSUMS[kind]).hexdigest()


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(folder: Path) -> str:
    return ", ".join(path.name for path in _published(folder) if (path / COMPLETE).is_file()) or "none"
