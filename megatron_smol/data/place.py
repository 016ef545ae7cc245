"""Where preprocessing writes, and who may write there: the output's layout, its work folder, its locks.

Used by data/tokenize.py. Everything unfinished lies in `.<name>.preprocess/<digest>/` in the output folder,
where the digest is that of inputs and settings: two commands with the same ones continue each other, with
others they do not meet. One process works alone; the tasks of an array job share the folder.
"""

from __future__ import annotations

import glob
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_smol.data.files import PARTIAL
from megatron_smol.data.manifest import FOLDER_MANIFEST, PREFIX_MANIFEST
from megatron_smol.data.origins import ORIGINS_END
from megatron_smol.errors import UserError
from megatron_smol.flock import flock, is_at, locked_file

_LOCK, _ASSEMBLY_LOCK = "lock", "assembly.lock"
_LEAVING_SECONDS = 0.05  # between two looks whether a task that leaves has gone
PLAN = "plan.json"


@dataclass(frozen=True)
class Share:
    """The part of the work that one task of an array job does: blocks rank, rank + tasks, ..."""

    rank: int = 0
    tasks: int = 1

    def __post_init__(self) -> None:
        if self.tasks < 1 or not 0 <= self.rank < self.tasks:
            raise UserError(
                f"--rank {self.rank} --world-size {self.tasks} is no share of the work: ranks go from 0 to "
                f"world size - 1"
            )

    def __contains__(self, number: int) -> bool:
        return number % self.tasks == self.rank

    @property
    def is_all(self) -> bool:
        return self.tasks == 1


@dataclass(frozen=True)
class Place:
    """Where the output lies: a folder of shards, or one Megatron prefix."""

    folder: Path
    prefix: str | None

    @classmethod
    def of_prefix(cls, path: str | Path) -> Place:
        return cls(Path(path).parent, Path(path).name)

    @property
    def manifest(self) -> Path:
        return self.folder / (self.prefix + PREFIX_MANIFEST if self.prefix else FOLDER_MANIFEST)

    @property
    def work(self) -> Path:
        return self.folder / f".{self.prefix or 'source'}.preprocess"

    @property
    def name(self) -> str:
        return self.prefix or self.folder.resolve().name

    @property
    def path(self) -> Path:
        return self.folder / self.prefix if self.prefix else self.folder

    def shard(self, number: int) -> str:
        return self.prefix or f"shard-{number:05d}"

    def shard_files(self) -> list[Path]:
        stem = glob.escape(self.prefix) if self.prefix else "shard-*"
        return [file for end in (".bin", ".idx", ORIGINS_END) for file in self.folder.glob(stem + end)]

    @property
    def is_begun(self) -> bool:
        """Whether a command like this one has left unfinished work."""
        return any(self.work.glob(f"*/{PLAN}"))

    def remove_other_work(self, digest: str) -> None:
        """What commands with other inputs or settings left, and all half-written files. For who is alone."""
        for folder in self.work.iterdir():
            if folder.is_dir() and folder.name != digest:
                shutil.rmtree(folder)
        for file in (*self.partials(), *(self.work / digest).glob(f"*{PARTIAL}")):
            file.unlink()

    def partials(self) -> list[Path]:
        """Half-written files of the output; another prefix may be written in the same folder right now."""
        own = f"{glob.escape(self.prefix)}." if self.prefix else ""
        return list(self.folder.glob(f"{own}*{PARTIAL}"))

    @contextmanager
    def claimed(self, share: Share) -> Iterator[None]:
        """Hold the output: alone, or as one task of an array job. The locks go with the process, however it
        ends; the last to leave a finished output removes the work folder."""
        with ExitStack() as stack:
            stream = stack.enter_context(self._locked(shared=not share.is_all))
            if not share.is_all:
                own = self.work / f"task-{share.rank}-of-{share.tasks}.lock"
                if not flock(stack.enter_context(own.open("a+"))):
                    raise UserError(
                        f"task {share.rank} of {share.tasks} is running already, on {self.path}; wait for "
                        f"it, or stop it"
                    )
            try:
                yield
            finally:
                if (self.manifest.exists() or not self.is_begun) and flock(stream):
                    self._remove_work(stream)

    @contextmanager
    def assembling(self, work: Path) -> Iterator[bool]:
        """Whether this process may put the shards together: one task at a time."""
        with (work / _ASSEMBLY_LOCK).open("a+") as stream:
            yield flock(stream)

    @contextmanager
    def _locked(self, shared: bool) -> Iterator[IO[str]]:
        while True:
            with suppress(FileExistsError):
                self.work.mkdir(parents=True)
            try:
                stream = locked_file(self.work / _LOCK, shared=shared)
            except FileNotFoundError:
                if self.work.is_symlink():  # to nowhere
                    raise
                continue  # another command finished and took the folder away just now
            if stream is not None:
                with stream:
                    yield stream
                return
            if not (shared and self.manifest.exists()):
                raise UserError(f"another command is writing to {self.folder}; wait for it, or stop it")
            time.sleep(_LEAVING_SECONDS)  # all is done: the last task is leaving

    def _remove_work(self, lock: IO[str]) -> None:
        """The lock goes last: it keeps out a task that comes now, which would go on with half of the work."""
        if not is_at(lock, self.work / _LOCK):
            return
        with suppress(OSError):  # what stays is removed by the next command here
            for entry in self.work.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != _LOCK:
                    entry.unlink()
            (self.work / _LOCK).unlink()
            self.work.rmdir()  # unless another has come since, whose lock is in it
