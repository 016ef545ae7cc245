"""The primitive under all locks: whose file counts when it is removed or replaced, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.data.place import Place, Share
from megatron_smol.errors import DiskError, UserError
from megatron_smol.flock import is_at, locked_file
from megatron_smol.train.lock import take_lock


def test_one_holder_or_several_that_share(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    alone = locked_file(path)
    assert alone and locked_file(path) is None and locked_file(path, shared=True) is None
    alone.close()
    first, second = locked_file(path, shared=True), locked_file(path, shared=True)
    assert first and second and locked_file(path) is None
    first.close()
    second.close()
    again = locked_file(path)
    assert again
    again.close()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_went_while_it_was_opened_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    path, flock = tmp_path / "lock", fcntl.flock

    def holder_leaves(*arguments: Any) -> None:
        monkeypatch.undo()
        path.unlink()
        if replaced:
            path.touch()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", holder_leaves)
    found = locked_file(path)
    assert found and is_at(found, path) and locked_file(path) is None
    found.close()


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSYS, UserError), (errno.ENOLCK, DiskError), (errno.EIO, OSError)],
)
def test_a_file_system_without_locks_is_told_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: type[Exception]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = "Input/output" if told is OSError else "has no file locks"
    with pytest.raises(told, match=said) as found, Place(tmp_path / "out", None).claimed(Share()):
        pass
    assert type(found.value) is told
    with pytest.raises(told, match=said):
        take_lock(tmp_path, print)
