"""Whole shards of object stores on the local disk, shared by the ranks of a node; data/stores.py fills it.

One folder a source, named by its manifest's hash, so that a changed source never meets old shards. What is
downloaded counts with its full size from the start, so the limit holds while several ranks fetch. Sources
that a living process has open keep their shards; those of others go, the least recently used first. A
shuffled epoch reads every shard alike, so throwing out shards in use to fetch others would only move bytes.

SMOL_CACHE names the folder (default ~/.cache/megatron_smol), SMOL_CACHE_GB its limit (default 100).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol

from megatron_smol.data.files import PARTIAL, flush_to_disk, partial_path, publish, write_whole
from megatron_smol.errors import DataError, UserError

DEFAULT_FOLDER, DEFAULT_GB = "~/.cache/megatron_smol", "100"
_IN_USE, _LOCK = ".in-use", ".lock"


class _File(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str | None: ...


class FileCache:
    """At most `limit_bytes` of files under `folder`, each whole or absent."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._claims: list[IO[str]] = []
        self._have: set[Path] = set()

    @classmethod
    def from_environment(cls) -> FileCache:
        given = os.environ.get("SMOL_CACHE_GB", DEFAULT_GB)
        try:
            limit = int(float(given) * 1e9)
        except (ValueError, OverflowError):
            limit = -1
        if limit < 0:
            raise UserError(
                f"SMOL_CACHE_GB is {given!r}; give the size of the shard cache in GB, such as 100"
            )
        return cls(Path(os.environ.get("SMOL_CACHE", DEFAULT_FOLDER)).expanduser(), limit)

    def folder_of(self, url: str, manifest_bytes: bytes) -> Path:
        """The folder of a source, claimed for the life of this object."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rsplit("/", 1)[-1])[:40] or "source"
        folder = self.folder / f"{name}-{hashlib.sha256(manifest_bytes).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        claim = (folder / _IN_USE).open("w")
        fcntl.flock(claim, fcntl.LOCK_SH)
        self._claims.append(claim)
        return folder

    def keep(self, folder: Path, name: str, data: bytes) -> Path:
        """A small file that every rank brings along; its lock tells that its partial file is not a stale one."""
        path = folder / name
        with _locked(folder / f".{name}{_LOCK}"):
            if not path.is_file():
                write_whole(path, data)
        return path

    def get(self, folder: Path, file: _File) -> Path | None:
        """Where a whole file lies, None when it is not here (yet)."""
        path = folder / file.name
        if path in self._have:
            return path
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == file.bytes:
                os.utime(path)
                self._have.add(path)
                return path
        return None

    def fetch(
        self, folder: Path, file: _File, address: str, blocks: Iterable[bytes], wait: bool = True
    ) -> Path | None:
        """Bring a file in and check it; None when there is no room, or another process is at it and `wait` is off."""
        path = folder / file.name
        with _locked(folder / f".{file.name}{_LOCK}", wait) as mine:
            if not mine:
                return None
            if (found := self.get(folder, file)) is not None:
                return found
            for stale in folder.glob(f"{file.name}.*{PARTIAL}"):  # of a fetch that was killed
                stale.unlink(missing_ok=True)
            partial = partial_path(path)
            try:
                if not self._reserve(partial, file.bytes):
                    return None
                with partial.open("r+b") as stream:
                    _write_checked(stream, file, address, blocks)
                with _locked(self.folder / _LOCK):  # whoever counts sees it under one of its names
                    publish(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return self.get(folder, file)

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make room and take it: an empty file of full length counts for everyone who looks."""
        with _locked(self.folder / _LOCK):
            if not self._make_room(size) or shutil.disk_usage(self.folder).free < size:
                return False
            with partial.open("wb") as stream:
                stream.truncate(size)
            return True

    def _make_room(self, size: int) -> bool:
        for partial in self.folder.glob(f"*/*{PARTIAL}"):
            name = partial.name.removesuffix(PARTIAL).rpartition(".")[0]
            with _locked(partial.with_name(f".{name}{_LOCK}"), wait=False) as stale:
                if stale:  # its writer is gone
                    partial.unlink(missing_ok=True)
        files = [path for path in self.folder.glob("*/*") if not path.name.startswith(".")]
        facts: dict[Path, os.stat_result] = {}
        for path in files:
            with contextlib.suppress(FileNotFoundError):  # a fetch that failed takes its own away
                facts[path] = path.stat()
        excess = sum(stat.st_size for stat in facts.values()) + size - self.limit_bytes
        for path in sorted(facts, key=lambda path: facts[path].st_mtime):
            if excess <= 0:
                break
            with _locked(path.parent / _IN_USE, wait=False) as unused:
                if unused and not path.name.endswith(PARTIAL):
                    path.unlink(missing_ok=True)
                    excess -= facts[path].st_size
        return excess <= 0


def _write_checked(stream: IO[bytes], file: _File, address: str, blocks: Iterable[bytes]) -> None:
    digest, written = hashlib.sha256(), 0
    for block in blocks:
        written += len(block)
        if written > file.bytes:
            break
        digest.update(block)
        stream.write(block)
    flush_to_disk(stream)
    if written != file.bytes:
        raise DataError(
            f"{address} has {'more than ' if written > file.bytes else ''}{min(written, file.bytes):,} bytes, its "
            f"manifest says {file.bytes:,}; upload it again"
        )
    if file.sha256 is not None and (found := digest.hexdigest()) != file.sha256:
        raise DataError(
            f"{address} changed since it was written: sha256 {found[:12]}, its manifest says "
            f"{file.sha256[:12]}; upload it again"
        )


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file; yields False when another holds it and `wait` is off. A kill lets go of it."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
