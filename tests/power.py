"""What a disk holds when the power goes out: only what was flushed.

A recorder of one process's flushes and renames below a folder. Before each of them, and after the last, it keeps what a
power cut at that moment would leave, in two ways a file system may have it:

    "nothing"   every folder as it was when it was last flushed, every file with the content it was last flushed with
    "names"     every folder as it is, every file with the content it was last flushed with (none: it is empty)

Files of any size are kept as they are when flushed, so this is for small ones.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir")


@dataclass(frozen=True)
class Cut:
    """The disk after a power cut before `call`. promised: what `Disk.promised` was then."""

    call: str
    promised: Any
    tree: dict[str, bytes | None]  # relative path -> content; None: a folder

    def lay_out(self, where: Path, without: str = "nothing") -> None:
        """without: the end of the names of files that are left out."""
        for name, content in self.tree.items():
            path = where / name
            if name.endswith(without):
                continue
            path.mkdir(parents=True, exist_ok=True) if content is None else path.write_bytes(content)


@dataclass
class Disk:
    """`with Disk(folder).watched() as disk: ...`, then `disk.cuts`. What is there at first counts as flushed."""

    root: Path
    promised: Any = None
    cuts: list[Cut] = field(default_factory=list)
    _contents: dict[int, bytes] = field(default_factory=dict)
    _entries: dict[int, dict[str, int]] = field(default_factory=dict)
    _held: dict[int, int] = field(default_factory=dict)  # open, so that no number is given again
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        for path in (self.root, *self.root.rglob("*")):
            self._flushed(path)
        real = {name: getattr(os, name) for name in _CALLS}
        for name, call in real.items():
            setattr(os, name, self._watching(name, call))
        try:
            yield self
        finally:
            for name, call in real.items():
                setattr(os, name, call)
            self._cut("the end")
            for descriptor in self._held.values():
                os.close(descriptor)

    def _watching(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(target: Any, *more: Any, **named: Any) -> Any:
            with self._lock:
                path = Path(f"/proc/self/fd/{target}").readlink() if name == "fsync" else Path(target)
                inside = not path.is_absolute() or path.is_relative_to(self.root)  # rmtree gives bare names
                if inside:
                    self._cut(f"{name} {path.name}")
                done = call(target, *more, **named)
                if inside and name == "fsync":
                    self._flushed(path)
                return done

        return watching

    def _flushed(self, path: Path) -> None:
        number = self._hold(path)
        if path.is_dir():
            self._entries[number] = {entry.name: self._hold(entry) for entry in path.iterdir()}
        else:
            self._contents[number] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        found = path.stat()
        if found.st_ino not in self._held:
            self._held[found.st_ino] = os.open(path, os.O_RDONLY)
        return found.st_ino

    def _cut(self, call: str) -> None:
        for tree in (self._of_flushed_folders(), self._of_names()):
            if not self.cuts or tree != self.cuts[-1].tree:
                self.cuts.append(Cut(call, self.promised, tree))

    def _of_flushed_folders(self) -> dict[str, bytes | None]:
        tree: dict[str, bytes | None] = {}

        def walk(number: int, name: str) -> None:
            if not stat.S_ISDIR(os.fstat(self._held[number]).st_mode):
                tree[name] = self._contents.get(number, b"")
                return
            tree[name] = None
            for entry, inner in self._entries.get(number, {}).items():
                walk(inner, str(Path(name, entry)))

        walk(self.root.stat().st_ino, ".")
        return tree

    def _of_names(self) -> dict[str, bytes | None]:
        paths = [self.root, *sorted(self.root.rglob("*"))]
        return {
            str(path.relative_to(self.root)): None
            if path.is_dir()
            else self._contents.get(self._hold(path), b"")
            for path in paths
        }
