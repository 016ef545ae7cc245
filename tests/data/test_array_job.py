"""Tasks of an array job over one folder: the bytes of one process, whoever comes first, last, twice or not at all."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest

from megatron_smol.data import corpus
from megatron_smol.data.array_job import share_of
from megatron_smol.data.inputs import expand_inputs
from megatron_smol.data.manifest import Manifest, read_manifest
from megatron_smol.data.place import Place, Share
from megatron_smol.data.tokenize import preprocess
from megatron_smol.data.tokenizer import Tokenizer
from megatron_smol.errors import UserError

from .test_tokenize import TEXTS, contents, write_lines


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Plain, compressed and text files, so that units of every kind are shared."""
    folder = tmp_path / "in"
    folder.mkdir()
    thirds = [[{"text": text} for text in TEXTS[start::3]] for start in range(3)]
    (folder / "d.txt").write_text("A text file.")
    return [
        write_lines(folder / "a.jsonl", thirds[0]),
        write_lines(folder / "b.jsonl.gz", thirds[1]),
        write_lines(folder / "c.jsonl.gz", thirds[2]),
        folder / "d.txt",
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1500)


def run(inputs: list[Path], out: Path, tokenizer: Tokenizer, share: Share, **options: Any) -> Manifest | None:
    settings = {"workers": 1, "shard_tokens": 4000, "source": "s"} | options
    return preprocess(inputs, out, tokenizer, share=share, **settings)


@pytest.mark.parametrize("tasks", [2, 5])
def test_tasks_in_any_order_write_the_bytes_of_one_process(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer, tasks: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run(inputs, tmp_path / "whole", tokenizer, Share())
    order = list(range(tasks))
    random.Random(tasks).shuffle(order)
    out = tmp_path / "out"
    for rank in order[:-1]:
        assert run(inputs, out, tokenizer, Share(rank, tasks)) is None
        assert not list(out.glob("shard-*"))
    assert "other tasks' records are not there yet" in capfd.readouterr().err
    assert run(inputs, out, tokenizer, Share(order[0], tasks)) is None  # again: nothing to do, no harm
    finished = run(inputs, out, tokenizer, Share(order[-1], tasks))
    assert finished is not None and finished == read_manifest(out / "manifest.json")
    assert contents(out) == contents(tmp_path / "whole")
    assert run(inputs, out, tokenizer, Share(order[0], tasks)) == finished
    assert contents(out) == contents(tmp_path / "whole")


def test_a_share_is_done_by_its_task_alone(tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    done: list[set[str]] = []
    for rank in range(3):
        before = {file.name for file in out.rglob("block-*.json")}
        if rank == 2:
            break
        run(inputs, out, tokenizer, Share(rank, 3))
        done.append({file.name for file in out.rglob("block-*.json")} - before)
    plain = [{name for name in names if name.startswith("block-000000-")} for names in done]
    assert all(plain) and abs(len(plain[0]) - len(plain[1])) <= 1  # one large file is shared too
    whole = [{name.split("-")[1] for name in names} - {"000000"} for names in done]
    assert not whole[0] & whole[1]  # a compressed file belongs to one task


def test_another_number_of_tasks_finishes_what_some_began(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer
) -> None:
    run(inputs, tmp_path / "whole", tokenizer, Share())
    run(inputs, tmp_path / "out", tokenizer, Share(1, 3))
    assert run(inputs, tmp_path / "out", tokenizer, Share()) is not None  # one process takes over
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_tasks_with_other_settings_do_not_mix(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer
) -> None:
    run(inputs, tmp_path / "whole", tokenizer, Share(), seed=1)
    run(inputs, tmp_path / "out", tokenizer, Share(0, 2), seed=2)
    run(inputs, tmp_path / "out", tokenizer, Share(0, 2), seed=1)
    assert run(inputs, tmp_path / "out", tokenizer, Share(1, 2), seed=1) is not None
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match="made with another seed"):
        run(inputs, tmp_path / "out", tokenizer, Share(1, 2), seed=2)


def test_only_one_process_has_a_rank_and_none_works_beside_a_lone_one(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer
) -> None:
    place = Place(tmp_path / "out", None)
    with place.claimed(Share(0, 2)):
        with pytest.raises(UserError, match="task 0 of 2 is running already"), place.claimed(Share(0, 2)):
            pass
        with pytest.raises(UserError, match="another command is writing"):
            run(inputs, place.folder, tokenizer, Share())
        assert run(inputs, place.folder, tokenizer, Share(1, 2)) is None
    with place.claimed(Share()), pytest.raises(UserError, match="another command is writing"):
        run(inputs, place.folder, tokenizer, Share(0, 2))
    assert run(inputs, place.folder, tokenizer, Share(0, 2)) is not None


def test_only_one_task_puts_the_shards_together(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    run(inputs, out, tokenizer, Share(0, 2))
    (work,) = (path.parent for path in out.rglob("plan.json"))
    with Place(out, None).assembling(work) as mine:
        assert mine
        assert run(inputs, out, tokenizer, Share(1, 2)) is None  # all is there, another assembles
        assert not list(out.glob("shard-*"))
    assert run(inputs, out, tokenizer, Share(0, 2)) is not None  # any one of them again


@contextmanager
def leaving(place: Place) -> Iterator[TextIO]:
    """As the last task does it: hold the lock alone while the work folder goes."""
    place.work.mkdir(parents=True)
    with (place.work / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def test_a_task_that_comes_while_the_last_one_leaves_finds_the_work_done(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "out", None)
    finished = run(inputs, place.folder, tokenizer, Share())
    waited: list[float] = []
    with leaving(place) as lock:

        def gone_after_two_looks(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                shutil.rmtree(place.work)
                lock.close()

        monkeypatch.setattr("megatron_smol.data.place.time.sleep", gone_after_two_looks)
        assert run(inputs, place.folder, tokenizer, Share(1, 3)) == finished
    assert len(waited) == 2 and not place.work.exists()


def test_the_lock_is_the_last_to_go(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that comes meanwhile would take what is left of the work for all of it."""
    removed: list[str] = []

    def noting(real: Any) -> Any:
        def remove(path: Any, *args: Any, **named: Any) -> None:
            removed.append(Path(path).name)
            real(path, *args, **named)

        return remove

    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    run(inputs, tmp_path / "out", tokenizer, Share(0, 1))
    assert {"plan.json", "assembly.lock"} < set(removed)
    assert removed[-2:] == ["lock", ".source.preprocess"]


def test_the_lock_of_an_earlier_work_folder_removes_nothing(tmp_path: Path) -> None:
    """Of two tasks that leave at once, the second can get its lock when another has begun anew in the meantime."""
    place = Place(tmp_path / "out", None)
    with place.claimed(Share(0, 2)):
        shutil.rmtree(place.work)
        place.work.mkdir()
        (place.work / "record").touch()
    assert (place.work / "record").exists()


# A rank that is killed dies before its third block is done: with the parts of the block there, its record not.
SCRIPT = """
import os, signal, sys
from megatron_smol.data import corpus, encode
from megatron_smol.data.place import Share
from megatron_smol.data.tokenize import preprocess

corpus.BLOCK_BYTES = 1500
fate, output, tokenizer, rank, tasks, *given = sys.argv[1:]
write, blocks = encode.write_whole, []

def dying(path, text):
    if path.name.startswith("block-"):
        blocks.append(path)
        if fate == "dies" and len(blocks) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)

encode.write_whole = dying
share = Share(int(rank), int(tasks))
preprocess(given, output, tokenizer, workers=1, shard_tokens=4000, source="s", share=share)
"""


def test_tasks_at_the_same_time_of_which_some_are_killed(
    tmp_path: Path, inputs: list[Path], tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    run(inputs, tmp_path / "whole", tokenizer, Share())
    out, tasks = tmp_path / "out", 3

    def start(rank: int, fate: str = "lives") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, fate, out, tokenizer_folder, rank, tasks, *inputs]
        return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)

    def codes(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
        said = [process.communicate()[1] for process in processes]
        return [process.returncode for process in processes], "".join(said)

    first, log = codes([start(rank, "dies" if rank == 1 else "lives") for rank in range(tasks)])
    assert first == [0, -signal.SIGKILL, 0], log
    assert not (out / "manifest.json").exists()
    again, log = codes([start(rank) for rank in (1, 2, 0)])
    assert again == [0, 0, 0], log
    assert contents(out) == contents(tmp_path / "whole"), (
        "the task that ended last has put the shards together"
    )
    third, log = codes([start(rank) for rank in (1, 2, 0)])
    assert third == [0, 0, 0], log
    assert contents(out) == contents(tmp_path / "whole")


def test_the_blocks_of_all_ranks_are_all_blocks(inputs: list[Path], tmp_path: Path) -> None:
    units = list(corpus.numbered(corpus.cut_units(expand_inputs(inputs))))
    numbers = [first + index for unit, first in units for index in range(unit.known_blocks or 1)]
    assert numbers == list(range(len(numbers)))
    for tasks in (1, 2, 7):
        owners = [[rank for rank in range(tasks) if number in Share(rank, tasks)] for number in numbers]
        assert all(len(owner) == 1 for owner in owners)
        counts = [sum(owner == [rank] for owner in owners) for rank in range(tasks)]
        assert max(counts) - min(counts) <= 1


def test_rank_and_world_size() -> None:
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert share_of(None, None, {}) == Share(0, 1)
    assert share_of("1", "2", {}) == Share(1, 2)
    assert share_of("slurm", "slurm", slurm) == Share(3, 8)
    assert share_of("slurm", "64", slurm | {"SLURM_ARRAY_TASK_ID": "17"}) == Share(17, 64)
    for rank, world_size, environment, why in (
        ("1", None, {}, "belong together"),
        ("2", "2", {}, "ranks go from 0"),
        ("0", "0", {}, "no share"),
        ("x", "2", {}, "must be a number or 'slurm'"),
        ("-1", "2", {}, "must be a number"),
        ("slurm", "4", {}, "SLURM_ARRAY_TASK_ID is not set"),
        ("slurm", "slurm", slurm | {"SLURM_ARRAY_TASK_ID": "8"}, "must begin at 0 .*--array=0-7"),
    ):
        with pytest.raises(UserError, match=why):
            share_of(rank, world_size, environment)
