"""kill -9 of a curation, of its parent and of a worker: the same command gives the same bytes, and nobody is left behind.

CURATE_KILLS=10 kills ten times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from datatrove.data import Document

from megatron_smol.curate.config import load_curation
from megatron_smol.curate.local import Tasks
from megatron_smol.curate.parts import ReadPart, WritePart, written
from megatron_smol.curate.pipeline import curate
from megatron_smol.errors import DataError, RunError
from tests.tiny import environment

KILLS = int(os.environ.get("CURATE_KILLS", "2"))
TASKS = 4
# Counts what the process does to files of the output (opening, renaming, removing), and ends it before the n-th.
COUNTED = """
import os, signal, sys
config, output, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0
def count(event, args):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(output):
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
from megatron_smol.curate.config import load_curation
from megatron_smol.curate.pipeline import curate
sys.addaudithook(count)
curate(load_curation(Path(config), {"output": output}))
print(seen)
"""


def everything(output: Path) -> dict[str, bytes]:
    """All files of the result, whatever their names."""
    found = {path.name: path.read_bytes() for path in (output / "documents").iterdir()}
    return found | {"card": (output / "card.json").read_bytes()}


def python(*arguments: object) -> list[str]:
    return [sys.executable, "-c", *map(str, arguments)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    chance = random.Random(0)
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(TASKS):
        texts = [" ".join(chance.choices("abcdefgh", k=60)) + f" {number}" for _ in range(40)]
        texts[0] = "the same in every file, word for word"
        (raw / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        "name": "kills",
        "inputs": {"paths": str(raw)},
        "output": "set below",
        "tasks": TASKS,
        "workers": 1,
    }
    path = tmp_path / "curation.yaml"
    path.write_text(yaml.safe_dump(settings | {"steps": ["exact", {"match": {"pattern": "a b"}}, "minhash"]}))
    return path


def test_kills_between_any_two_operations_on_files(config: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = python(COUNTED, config, whole, 0)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    operations, chance = int(done.stdout), random.Random(3)
    assert operations > 20 * TASKS
    for _ in range(KILLS):
        command = python(COUNTED, config, out, chance.randint(1, operations // KILLS))
        ended = subprocess.run(
            command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        assert ended.returncode == -signal.SIGKILL
    curate(load_curation(config, {"output": str(out)}))
    assert everything(out) == everything(whole)
    assert sorted(everything(out)) == [*(f"{rank:05d}.jsonl.zst" for rank in range(TASKS)), "card"]


def test_what_killed_writers_left_is_removed_and_a_live_one_cannot_publish(tmp_path: Path) -> None:
    left = tmp_path / "00000.jsonl.zst.4194304.partial"
    left.write_bytes(b"half")
    other = tmp_path / "00001.jsonl.zst.4194304.partial"
    other.write_bytes(b"another task's")

    def overtaken() -> Iterator[Document]:
        """While this task reads its documents, the same command is started again and ends first."""
        yield Document(text="slow", id="1")
        for mine in tmp_path.glob("00000.*"):
            mine.rename(left)  # as a process of another id would have named it
        list(WritePart(tmp_path).run(iter([Document(text="quick", id="2")])))

    with pytest.raises(DataError, match="another run of the same command"):
        list(WritePart(tmp_path).run(overtaken()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.jsonl.zst", other.name]
    assert [document.text for document in ReadPart(tmp_path).run(None)] == ["quick"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), written(tmp_path / "a") as stream:
        stream.write(b"half")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


# --- processes ---------------------------------------------------------------------------------------------


class SaysWhoAndStays:
    """A block that tells its process id and never ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        (self.folder / f"{rank}.new").write_text(str(os.getpid()))
        (self.folder / f"{rank}.new").rename(self.folder / f"{rank}.pid")
        while True:
            time.sleep(60)


def killed_in_its_task(data: Any, rank: int = 0, world_size: int = 1) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(true: Any, what: str) -> None:
    for _ in range(3000):  # 5 minutes: only a failure takes that long
        if true():
            return
        time.sleep(0.1)
    raise AssertionError(f"still not so: {what}")


def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megatron_smol.curate.local import Tasks\n"
        "from tests.curate.test_kills import SaysWhoAndStays\n"
        "folder = Path(sys.argv[1])\n"
        "with Tasks(2) as tasks: tasks.run('two', [SaysWhoAndStays(folder)], 2, folder / 'logs')\n"
    )
    command = subprocess.Popen(python(program, tmp_path), env=environment(), start_new_session=True)
    try:
        wait_until(
            lambda: len(list(tmp_path.glob("*.pid"))) == 2 or command.poll() is not None, "two workers"
        )
        workers = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        assert len(workers) == 2 and all(map(is_alive, workers))
        command.kill()
        command.wait()
        wait_until(lambda: not any(map(is_alive, workers)), "the workers have ended")
    finally:
        command.kill()


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    with Tasks(2) as tasks, pytest.raises(RunError, match="fewer --workers"):
        tasks.run("two", [killed_in_its_task], 2, tmp_path)
