"""Files that are complete or absent, used by everything below `data/` that writes.

A file is written aside under a name ending in `.partial`, flushed to the disk, then renamed into place. A
full disk becomes one sentence with the path and the bytes needed, and the partial file is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megatron_smol.errors import NO_ROOM, DiskError, UserError

PARTIAL = ".partial"
_READ_BYTES = 8 << 20


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is whole. The process id keeps two writers from mixing their bytes."""
    return path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")


@contextlib.contextmanager
def explained_disk_errors(
    path: Path, needed_bytes: int, clean_up: Callable[[], None] | None = None
) -> Iterator[None]:
    """Turn "no space left" while writing `path` into a DiskError that says what is needed."""
    try:
        yield
    except OSError as error:
        if clean_up:
            clean_up()  # first: what it removes counts as free again
        if error.errno not in NO_ROOM:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskError(
            f"no room to write {path} ({os.strerror(error.errno)}): at least {needed_bytes:,} bytes are "
            f"needed, {free:,} are free on that disk; free some space or choose another output, then run "
            f"the same command again"
        ) from error


def require_folder(output: Path) -> None:
    """Before the work: UserError where the output is to be a folder and is a file."""
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {output} is a file; give a folder")


def check_room(folder: Path, needed_bytes: int) -> None:
    """Refuse to start a write that cannot fit."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskError(
            f"no room in {folder}: {needed_bytes:,} bytes are needed, {free:,} are free on that disk; free "
            f"some space or choose another output, then run the same command again"
        )


def flush_to_disk(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def publish(partial: Path, path: Path) -> None:
    """Rename a finished partial file into place, and make the rename itself survive a power cut."""
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees all of it or the previous one."""
    data = content.encode() if isinstance(content, str) else content
    partial = partial_path(path)
    try:
        with explained_disk_errors(path, len(data)), partial.open("wb") as stream:
            stream.write(data)
            flush_to_disk(stream)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_blocks(path: Path) -> Iterator[bytes]:
    """A whole file, a few MB at a time; every block but the last is full."""
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            yield block


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)
    return digest.hexdigest()
