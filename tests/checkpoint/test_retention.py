"""Old checkpoints are removed while new ones are written, and the process is killed at random moments of both."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_smol.checkpoint import folder
from tests.tiny import environment

SAVES, KEEP, KILLS, MEGABYTES = 30, 2, 20, 4

# What a run does with its checkpoints, without the run.
SAVING = """
import sys, os
from pathlib import Path
from megatron_smol.checkpoint import folder
where, saves, keep, size, die_before_pruning = Path(sys.argv[1]), *map(int, sys.argv[2:])
folder.remove_unfinished(where)
found = folder.choose_newest(where)
folder.prune(where, keep, lambda _: False)
print("started", flush=True)
for step in range(found.step + 1 if found else 1, saves + 1):
    writing = where / f"{folder.WRITING}{step}-{os.getpid()}"
    writing.mkdir()
    folder.write_json(writing / folder.STATE, {"format": folder.FORMAT, "stage": "one", "stage_index": 0, "step": step})
    (writing / "weights").write_bytes(os.urandom(size << 20))
    final = where / folder.checkpoint_name("one", step)
    folder.publish(writing, final, folder.describe_files(writing, [folder.STATE, "weights"]))
    if step == die_before_pruning:
        os.kill(os.getpid(), 9)
    folder.prune(where, keep, lambda _: False)
"""


def saving(folder: Path, die_before_pruning: int = 0) -> list[str]:
    numbers = (SAVES, KEEP, MEGABYTES, die_before_pruning)
    return [sys.executable, "-c", SAVING, str(folder), *map(str, numbers)]


def used(folder: Path) -> float:
    """In checkpoints, whole or not."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / (MEGABYTES << 20)


def test_killed_between_publishing_and_pruning_again_and_again(tmp_path: Path) -> None:
    for step in range(KEEP + 1, KEEP + 5):
        done = subprocess.run(saving(tmp_path, step), env=environment(), stdout=subprocess.DEVNULL)
        assert done.returncode == -signal.SIGKILL
        assert KEEP + 1 <= used(tmp_path) <= KEEP + 1.01, f"killed after publishing step {step}"


def test_killed_at_random_there_is_always_a_whole_one_and_room(tmp_path: Path) -> None:
    command = saving(tmp_path)
    chance, kills, most, reached = random.Random(9), 0, 0.0, 0
    while kills < KILLS:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        most = max(most, used(tmp_path))
        published = folder.list_checkpoints(tmp_path)
        for one in published:
            folder.verify_files(one.path)
        steps = [one.step for one in published]
        assert steps == sorted(steps) and max(steps, default=0) >= reached, "what was published stays"
        reached = max(steps, default=0)
        if reached == SAVES:  # start over, to be killed more often
            for one in published:
                folder.discard(one.path)
            reached = 0
    print(f"\n{kills} kills: never more than {most:.2f} checkpoints on the disk, of which {KEEP} are kept")
    assert most <= KEEP + 1.01
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    left = [path.name for path in tmp_path.iterdir()]
    assert sorted(left) == [folder.checkpoint_name("one", step) for step in (SAVES - 1, SAVES)]
