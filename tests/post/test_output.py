"""The output folder: complete or no model, one piece of work, never somebody's files."""

from __future__ import annotations

import gc
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint.folder import fsync
from megatron_smol.errors import InUseError, UserError
from megatron_smol.post.output import Output, data_identity, model_identity
from megatron_smol.train.lock import take_lock
from tests.helpers import stop_after

ASKED = {"command": "sft", "model": "m", "data": "d", "settings": {"lr": 1.0, "seed": 1}}
MADE = ("config.json", "model.safetensors", "tokenizer.json")


def finished(folder: Path) -> Output:
    output = Output(folder)
    output.open(ASKED, overwrite=False)
    written = output.work / "model"
    written.mkdir()
    for name in MADE:
        (written / name).write_text(name)
    output.publish(written, {"steps": 3})
    return output


def test_a_finished_output_holds_the_model_alone(tmp_path: Path) -> None:
    output = finished(tmp_path / "out")
    assert output.complete and not output.work.exists()
    assert json.loads((output.folder / "tail.json").read_text()) == {"steps": 3, "asked": ASKED}
    output.open(ASKED, overwrite=True)  # the same work: left as it is
    assert output.complete


def test_config_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "out")
    output.open(ASKED, overwrite=False)
    written = output.work / "model"
    written.mkdir()
    for name in ("config.json", "a.safetensors", "z.json"):
        (written / name).write_text(name)
    moved: list[str] = []
    replace = Path.replace

    def stop_at_the_last(self: Path, target: Path) -> Path:
        moved.append(self.name)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        output.publish(written, {})
    assert moved[-1] == "config.json"
    assert not (output.folder / "config.json").exists() and not output.complete and output.work.is_dir()


@pytest.mark.parametrize("done", [True, False])
def test_other_work_is_refused_or_replaced(tmp_path: Path, done: bool) -> None:
    folder = tmp_path / "out"
    output = finished(folder) if done else Output(folder)
    output.open(ASKED, overwrite=False)
    other = {**ASKED, "model": "n", "settings": {"lr": 2.0, "seed": 1}}
    with pytest.raises(
        UserError, match=r"made from something else \(another model, lr 1.0 -> 2.0\); .* --overwrite"
    ):
        output.open(other, overwrite=False)
    output.open(other, overwrite=True)
    assert not output.complete and not (folder / "config.json").exists()
    output.open(other, overwrite=False)


def test_other_peoples_files_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        Output(tmp_path).open(ASKED, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        Output(tmp_path / "thesis.txt").open(ASKED, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_a_checkpoint_counts_when_it_is_whole(tmp_path: Path) -> None:
    output = Output(tmp_path)
    output.open(ASKED, overwrite=False)
    output.begin()
    said: list[str] = []
    assert output.newest_checkpoint(said.append) is None
    for step in (2, 10, 4):
        path = output.start / f"checkpoint-{step}" / "sub"
        path.mkdir(parents=True)
        (path / "weights").write_text(f"{step}" * 20)
        (path.parent / "optimizer.pt").write_text("o")
        output.mark_complete(step)
    unfinished = output.start / "checkpoint-12"
    unfinished.mkdir()
    (output.start / "checkpoint-10" / "sub" / "weights").write_text("1" * 40)  # the same size, other content
    newest = output.newest_checkpoint(said.append)
    assert newest is not None and newest.name == "checkpoint-4"
    assert "checkpoint-12 was not written to the end" in said[0] and "checkpoint-10" in said[1]
    assert {path.name for path in output.start.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_identity_is_of_the_content(base: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    assert model_identity(copy) == model_identity(base)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert model_identity(copy) != model_identity(base)
    rows = tmp_path / "a.jsonl"
    rows.write_text("{}\n")
    before = data_identity(str(rows))
    rows.write_text("[]\n")
    assert data_identity(str(rows)) != before


def test_two_jobs_in_one_output(tmp_path: Path) -> None:
    first, second = Output(tmp_path / "out"), Output(tmp_path / "out")
    first.open(ASKED, overwrite=False)
    with pytest.raises(
        UserError, match=r"another job is training in .*out.*; wait for it, or choose another"
    ):
        second.open(ASKED, overwrite=False)
    written = first.work / "model"
    written.mkdir()
    (written / "config.json").write_text("{}")
    first.publish(written, {})
    second.open(ASKED, overwrite=False)
    assert second.complete and not second.work.exists()


def test_one_that_waits_while_the_other_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first, second = Output(tmp_path / "out"), Output(tmp_path / "out")
    first.open(ASKED, overwrite=False)
    written = first.work / "model"
    written.mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second.open(ASKED, overwrite=False, say=lambda _: first.publish(written, {}))
    assert second.complete and not second.work.exists()


def test_one_that_waits_while_the_other_is_killed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    outputs = [Output(tmp_path / "out")]
    outputs[0].open(ASKED, overwrite=False)
    written = outputs[0].work / "model"
    written.mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")

    def killed_before_it_clears(_: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Output, "_remove_work", stopped)
            outputs.pop().publish(written, {})
        gc.collect()  # its lock

    second = Output(tmp_path / "out")
    second.open(ASKED, overwrite=False, say=killed_before_it_clears)
    assert second.complete and not second.work.exists()


def stopped(_: Output) -> None:
    raise KeyboardInterrupt


def test_publishing_survives_a_kill(tmp_path: Path) -> None:
    """At every file that goes or comes: what has a config.json is whole, and the same command ends or clears the work."""
    for allowed in itertools.count():
        folder = tmp_path / f"killed-after-{allowed}"
        killed = publish_until(allowed, folder)
        gc.collect()  # the lock of the one that was killed
        require_whole_if_it_loads(folder)
        output = Output(folder)
        output.open(ASKED, overwrite=False)
        assert output.complete is not output.work.exists()
        if not killed:
            break
    assert allowed >= 10, "so many files, and a kill before each"


def require_whole_if_it_loads(folder: Path) -> None:
    assert not (folder / "config.json").exists() or all((folder / name).exists() for name in MADE)


def publish_until(allowed: int, folder: Path) -> bool:
    """A run that ends; a kill comes after so many removals and renames. Whether it did."""
    output = Output(folder)
    output.open(ASKED, overwrite=False)
    output.begin()
    written = output.start / "model"
    written.mkdir()
    for name in MADE:
        (written / name).write_text(name)
    (output.start / "checkpoint-2").mkdir()
    (output.work / "tokens.arrow").touch()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(allowed, patch)
        try:
            output.publish(written, {})
        except KeyboardInterrupt:
            return True
    return False


def test_what_is_in_use_beside_a_whole_model_stays(tmp_path: Path) -> None:
    output = finished(tmp_path / "out")
    output.work.mkdir()
    lock = take_lock(output.work, print)  # one that is about to replace the model, say
    (output.work / "file").touch()
    again = Output(output.folder)
    again.open(ASKED, overwrite=False)
    assert again.complete and (output.work / "file").exists()
    lock.close()
    again.open(ASKED, overwrite=False)
    assert again.complete and not output.work.exists()


def test_one_that_comes_before_the_work_is_gone_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes a new lock when the old one is removed and the folder not yet."""
    other, unlink = Output(tmp_path / "out"), os.unlink

    def other_comes(path: Any, **named: Any) -> None:
        unlink(path, **named)
        if Path(path).name == ".lock":
            other.open({**ASKED, "model": "n"}, overwrite=True)

    monkeypatch.setattr(os, "unlink", other_comes)
    finished(other.folder)
    monkeypatch.undo()
    other.require()
    assert json.loads((other.work / "asked.json").read_text())["model"] == "n"


def test_one_that_was_shut_out_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = taken_over(tmp_path / "out", monkeypatch)
    for write in (
        first.begin,
        lambda: first.mark_complete(2),
        lambda: first.publish(first.start / "checkpoint-2", {}),
    ):
        with pytest.raises(InUseError):
            write()
    second.begin()
    second.mark_complete(2)


def taken_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Output, Output]:
    """A start that did not run for a while, and the one that took its folder over."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("LOCK_SECONDS", "0")
    first, second = Output(folder), Output(folder)
    first.open(ASKED, overwrite=False)
    first.begin()
    write(first.start / "checkpoint-2" / "weights", "2")
    first.mark_complete(2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second.open(ASKED, overwrite=False)
    return first, second


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # as the trainer does
    path.write_text(content)


def test_one_that_thaws_in_a_save_writes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = taken_over(tmp_path / "out", monkeypatch)
    half = first.start / "checkpoint-4"
    write(half / "weights", "old")
    with (half / "optimizer.pt").open("w") as stream:
        second.begin()
        newest = second.newest_checkpoint(print)
        assert newest == second.start / "checkpoint-2"
        for name in ("weights", "optimizer.pt"):
            write(second.start / "checkpoint-4" / name, "new")
        stream.write("old")  # the first one goes on
    write(half / "weights", "old")
    with pytest.raises(InUseError):
        first.mark_complete(4)
    second.mark_complete(4)
    assert {p.read_text() for p in (second.start / "checkpoint-4").glob("[!c]*")} == {"new"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    third = Output(tmp_path / "out")
    third.open(ASKED, overwrite=False)
    third.begin()
    assert third.newest_checkpoint(print) == third.start / "checkpoint-4"
    assert [*third.work.glob("start-*")] == [third.start], "what the first one wrote is cleared"


def test_one_that_sleeps_while_it_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last file is in place when the folder is taken over: the later start decides when the output is complete."""
    first, second = Output(tmp_path / "out"), Output(tmp_path / "out")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("LOCK_SECONDS", "0")
    first.open(ASKED, overwrite=False)
    write(first.work / "model" / "config.json", "{}")

    def sleeps_at_the_folder(path: Path) -> None:
        if path == first.folder:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            second.open(ASKED, overwrite=False)
        fsync(path)

    monkeypatch.setattr("megatron_smol.post.output.fsync", sleeps_at_the_folder)
    with pytest.raises(InUseError):
        first.publish(first.work / "model", {})
    assert not second.complete
    second.begin()


@pytest.mark.parametrize("complete", [True, False])
def test_replacing_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool) -> None:
    """At every file that goes or comes: the same command starts the new work, and nothing is left of the old."""
    other = {**ASKED, "model": "n"}
    for allowed in itertools.count():
        folder = old_work(tmp_path / f"killed-after-{allowed}", complete)
        killed = False
        with monkeypatch.context() as patch:
            stop_after(allowed, patch)
            try:
                Output(folder).open(other, overwrite=True)
            except KeyboardInterrupt:
                killed = True
        gc.collect()  # the lock of the one that was killed
        require_whole_if_it_loads(folder)
        Output(folder).open(other, overwrite=True)
        assert sorted(path.name for path in folder.rglob("*")) == [".lock", ".work", "asked.json"]
        assert json.loads((folder / ".work/asked.json").read_text()) == other
        if not killed:
            break
    assert allowed >= 7, "so many files, and a kill before each"


def old_work(folder: Path, complete: bool) -> Path:
    if complete:
        finished(folder)
    else:
        Output(folder).open(ASKED, overwrite=False)
        for name in ("checkpoint-2", "checkpoint-4"):
            write(folder / ".work" / "start-1" / name / "weights", "old")
    (folder / "metrics.jsonl").write_text("old")
    return folder
