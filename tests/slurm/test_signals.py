"""Signals that come early wait; a file stops a run as a signal does."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.helpers import run_ranks
from tests.tiny import TinyRun, environment, wait_for

EARLY = """
from megatron_smol.train import signals
signals.hold()
import os, signal, sys
assert "torch" not in sys.modules, "signals must be held before the seconds that torch takes"
for _ in range(2):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
print("held", flush=True)
flag = signals.StopFlag()
flag.install()
print(flag.received in (signal.SIGUSR1, signal.SIGTERM), flush=True)
"""


def test_signals_before_the_handler_wait_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["held", "True"]), done.stderr


LATE = """
import atexit, os, signal, threading, time
from megatron_smol.slurm import rank
from megatron_smol.train.signals import StopFlag

def train():
    StopFlag().install()
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # as a process group's: it takes signals too
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as Python leaves it behind when it ends
    return 75

atexit.register(lambda: os.kill(os.getpid(), signal.SIGUSR1))
rank._run = train
rank.main()
"""


def test_a_signal_while_a_rank_leaves_does_not_change_its_code() -> None:
    slurm = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LATE], env=environment(**slurm), capture_output=True, text=True
    )
    assert done.returncode == 75, done.stderr


def agreed(folder: str) -> list[int]:
    import torch

    from megatron_smol.train import signals
    from megatron_smol.train.signals import StopFlag

    torch.distributed.init_process_group("gloo")
    signals.LOOK_EVERY_SECONDS = 3600.0  # longer than a busy machine takes to get from one look to the next
    flag = StopFlag(Path(folder))
    first = flag.agreed()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:  # not the rank that looks
        (Path(folder) / "stop").touch()
    torch.distributed.barrier()
    immediately = flag.agreed()
    signals.LOOK_EVERY_SECONDS = 0.1
    time.sleep(0.2)
    return [first, immediately, flag.agreed()]


def test_all_ranks_agree_on_a_stop_file(tmp_path: Path) -> None:
    from megatron_smol.train.signals import ASKED_BY_FILE

    found = run_ranks(agreed, 2, str(tmp_path))
    assert found[0] == found[1] == [0, 0, ASKED_BY_FILE], "one look in that time, the same answer everywhere"


def test_stop_file_ends_a_run_saved(tiny: TinyRun) -> None:
    """RUN/stop: saved within a second's steps, exit code 75; removed, the run goes on to its end."""
    command = [
        sys.executable,
        "-m",
        "megatron_smol",
        "train",
        str(tiny.recipe),
        "stages.two.until=4000 steps",
        "save.every=1000 steps",
    ]
    extra = environment(SMOL_RUN_FOLDER=str(tiny.run))
    process = subprocess.Popen(
        command, env=extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    drain = threading.Thread(target=process.stdout.read)  # type: ignore[union-attr]
    drain.start()
    try:
        wait_for(tiny.run / "metrics.jsonl", 8, process)
        (tiny.run / "stop").touch()
        assert process.wait(120) == 75
    finally:
        process.kill()  # if it did not stop
        drain.join()
    steps = len((tiny.run / "metrics.jsonl").read_text().splitlines())
    assert (tiny.run / f"checkpoints/two-{steps:08d}/complete.json").is_file()
