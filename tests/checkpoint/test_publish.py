"""What a conversion writes is a whole model or absent: two at once, kills at every file, and what lies there already."""

from __future__ import annotations

import fcntl
import gc
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint.publish import published
from megatron_smol.errors import UserError
from tests.helpers import stop_after


def test_overwrite_never_removes_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with (
        pytest.raises(UserError, match="holds no model, so --overwrite does not replace it"),
        published(tmp_path / "home", overwrite=True),
    ):
        pass
    assert (tmp_path / "home" / "letter.txt").exists()


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists; choose another folder"), published(out, overwrite=False):
        made(out, "somebody's")
    assert contents(tmp_path) == {"out": "somebody's"}


def test_overwrite_through_a_link(tmp_path: Path) -> None:
    made(tmp_path / "model", "old")
    (tmp_path / "link").symlink_to("model")
    with published(tmp_path / "link", overwrite=True) as aside:
        made(aside, "new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path) == {"link": "new", "model": "new"}


def made(folder: Path, content: str) -> None:
    """All files of a model have the same content, so that a mixture shows."""
    folder.mkdir(exist_ok=True)
    for name in MADE:
        (folder / name).write_text(content)


MADE = ("config.json", "model.safetensors", "tokenizer.json")


def contents(parent: Path) -> dict[str, str]:
    """What lies there: the content of a whole folder, else how it is not whole."""
    found = {}
    for path in sorted(parent.iterdir()):
        texts = {file.name: file.read_text() for file in path.iterdir()} if path.is_dir() else {}
        whole = sorted(texts) == sorted(MADE) and len({*texts.values()}) == 1
        found[path.name] = next(iter(texts.values())) if whole else f"not whole: {texts}"
    return found


def test_two_conversions_to_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with published(out, overwrite=True) as aside:
        made(aside, "first")
        for path in (out, tmp_path / "elsewhere" / ".." / "out"):
            refused = r"^another conversion is writing .*out; wait for it, or choose another folder$"
            with pytest.raises(UserError, match=refused), published(path, overwrite=True):
                pass
        with published(tmp_path / "other", overwrite=False) as beside:
            made(beside, "other")
    assert contents(tmp_path) == {"out": "first", "other": "other"}
    with published(out, overwrite=True) as aside:
        made(aside, "second")
    assert contents(tmp_path) == {"out": "second", "other": "other"}


def test_the_lock_of_one_that_just_ended_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before its holder removed it, locked after: it would not keep a third one out."""
    held = published(tmp_path / "out", overwrite=False)
    made(held.__enter__(), "first")
    flock = fcntl.flock

    def first_ends(*arguments: Any) -> None:
        monkeypatch.undo()
        held.__exit__(None, None, None)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", first_ends)
    with published(tmp_path / "out", overwrite=True) as aside:
        made(aside, "second")
        with (
            pytest.raises(UserError, match="another conversion"),
            published(tmp_path / "out", overwrite=True),
        ):
            pass
    assert contents(tmp_path) == {"out": "second"}


CONVERSION = """
import sys, pathlib
from megatron_smol.checkpoint.publish import published
with published(pathlib.Path(sys.argv[1]), overwrite=False) as aside:
    (aside / "config.json").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_conversion_left_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", CONVERSION, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout and first.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match="another conversion is writing"), published(out, overwrite=False):
            pass
        assert (tmp_path / f"{on_disk.WRITING}out" / "config.json").read_text() == "half"
    finally:
        first.kill()
        first.communicate()
    with published(out, overwrite=False) as aside:
        assert not any(aside.iterdir())
        made(aside, "second")
    assert contents(tmp_path) == {"out": "second"}


def test_replacing_a_model_survives_a_kill(tmp_path: Path) -> None:
    """At every file that goes and every rename: `out` is a whole model or absent, and then the old one comes back."""
    seen = []
    for allowed in itertools.count():
        parent = tmp_path / f"killed-after-{allowed}"
        parent.mkdir()
        made(out := parent / "out", "old")
        finished = replaced_until(allowed, out)
        gc.collect()  # the lock of the one that was killed
        seen.append(contents(parent).get("out", "absent"))
        if seen[-1] == "new":
            require_no_half_model_returns(Path(shutil.copytree(parent, f"{parent}-copy")) / "out")
        with pytest.raises(UserError, match="exists"), published(out, overwrite=False):
            pass
        assert contents(parent) == {"out": "old" if seen[-1] == "absent" else seen[-1]}
        assert replaced_until(1000, out) and contents(parent) == {"out": "new"}
        if finished:
            break
    assert [state for state, _ in itertools.groupby(seen)] == ["old", "absent", "new"]
    assert len(seen) >= 8, (
        "three files and a folder of the old model, two renames, ..., and a kill before each"
    )


def require_no_half_model_returns(out: Path) -> None:
    """The new model is removed by hand, and what is left of the old one does not take its place."""
    shutil.rmtree(out)
    with pytest.raises(ZeroDivisionError), published(out, overwrite=True):
        raise ZeroDivisionError
    assert contents(out.parent) in ({}, {"out": "old"})


def replaced_until(allowed: int, out: Path) -> bool:
    """Replace a model; a kill comes after so many removals and renames. Whether it got to the end."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(allowed, patch)
        try:
            with published(out, overwrite=True) as aside:
                made(aside, "new")
        except KeyboardInterrupt:
            return False
    return True
