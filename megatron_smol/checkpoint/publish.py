"""A converted folder is complete or absent: written aside, flushed, renamed into place.

    .lock-OUT       while one conversion is at it
    .writing-OUT    what it writes
    .replaced-OUT   what --overwrite replaces, between two renames

Whatever a kill leaves of them, the next conversion to OUT clears. checkpoint/convert.py writes everything it makes
through `published`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.flock import locked_file


@contextmanager
def published(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends well, else it vanishes."""
    out = out.resolve()  # beside the folder itself, when `out` is a link to it
    aside = out.with_name(f"{on_disk.WRITING}{out.name}")
    with _alone(out):
        _clear(aside, out)
        _require_free(out, overwrite)
        try:
            with writing(out):
                aside.mkdir()
            yield aside
            _require_free(out, overwrite)  # somebody may have put files there meanwhile
            with writing(out):
                _put_in_place(aside, out)
        finally:
            _clear(aside, out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """UserError while another conversion writes `out`. The lock is the system's: it ends with its process."""
    path = out.with_name(f".lock-{out.name}")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = locked_file(path)
    if file is None:
        raise UserError(f"another conversion is writing {out}; wait for it, or choose another folder")
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _put_in_place(aside: Path, out: Path) -> None:
    """At every moment `out` is the whole old model, absent, or the whole new one."""
    for path in (*aside.rglob("*"), aside):
        on_disk.fsync(path)
    if out.exists():
        out.rename(_replaced(out))
    aside.rename(out)
    on_disk.fsync(out.parent)


def _clear(aside: Path, out: Path) -> None:
    """Remove what is unfinished or replaced; a model whose successor did not come returns."""
    shutil.rmtree(aside, ignore_errors=True)
    replaced = _replaced(out)
    if replaced.exists():
        with writing(out):
            # Half removed, it must not have a name from which it returns.
            replaced.rename(aside if out.exists() else out)
        shutil.rmtree(aside, ignore_errors=True)


def _replaced(out: Path) -> Path:
    return out.with_name(f"{on_disk.REPLACED}{out.name}")


def _require_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder, or replace it with --overwrite")
    if out.exists() and not _replaceable(out):
        raise UserError(f"{out} holds no model, so --overwrite does not replace it; choose another folder")


def _replaceable(out: Path) -> bool:
    """Whether --overwrite may remove it: a model's folder or an empty one, never somebody's home."""
    marks = ("config.json", on_disk.COMPLETE)
    return out.is_dir() and (any((out / mark).is_file() for mark in marks) or not any(out.iterdir()))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A full disk or a forbidden folder in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written ({error}); nothing was left there") from error


def require_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise CheckpointError(
            f"{out.parent} has {free / 1e6:,.1f} MB free and the converted model needs {needed / 1e6:,.1f} MB; "
            "free space there or choose another disk"
        )
