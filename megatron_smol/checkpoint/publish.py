"""A converted folder is complete or absent: written aside, flushed, renamed into place.

checkpoint/convert.py writes everything it makes through `published`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.errors import CheckpointError, UserError


@contextmanager
def published(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends well, else it vanishes."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder, or replace it with --overwrite")
    if out.exists() and not _replaceable(out):
        raise UserError(f"{out} holds no model, so --overwrite does not replace it; choose another folder")
    aside = out.parent / f"{on_disk.WRITING}{out.name}"
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
            aside.mkdir()
        yield aside
        with writing(out):
            for path in (*aside.iterdir(), aside):
                on_disk.fsync(path)
            if out.exists():
                shutil.rmtree(out)
            aside.rename(out)
            on_disk.fsync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
