"""What carries the runs out: it waits for a run that still trains, and hands a stop on to its processes."""

from __future__ import annotations

import fcntl
import io
import sys
import threading
from pathlib import Path

from rich.console import Console

from megatron_smol.ablate.config import load_ablation
from megatron_smol.ablate.recipes import runs_of
from megatron_smol.ablate.run import _Children, _Work
from megatron_smol.errors import EXIT_RESTART_ME
from tests.rebalance.runs import planted, write_ablation, write_run


class Heard(io.StringIO):
    """A terminal that says when something was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.something = threading.Event()

    def write(self, text: str) -> int:
        self.something.set()
        return super().write(text)


def test_a_run_that_still_trains_is_waited_for(tmp_path: Path) -> None:
    config = load_ablation(write_ablation(tmp_path, write_run(tmp_path), planted))
    runs, heard = runs_of(config), Heard()
    work = _Work(config, runs, Console(file=heard, width=200))
    waited = threading.Thread(target=work._wait_for_earlier, args=(runs[0], "run 1"))
    with (runs[0].recipe.run_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waited.start()
        assert heard.something.wait(600)
        waited.join(0.5)
        assert waited.is_alive() and "an earlier process is still training it" in heard.getvalue()
    waited.join(600)
    assert not waited.is_alive()
    work._wait_for_earlier(runs[1], "run 2")
    assert "run 2" not in heard.getvalue(), "nobody trains that one"


def test_a_stop_ends_the_processes_and_starts_no_more(tmp_path: Path) -> None:
    children, log, codes = _Children(), tmp_path / "log", list[int]()
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(3600)"]
    thread = threading.Thread(target=lambda: codes.append(children.call(command, log)))
    thread.start()
    while not (log.is_file() and "up" in log.read_text()):
        assert thread.is_alive()
    children.end()
    thread.join(600)
    assert codes == [-15] and children.call(command, log) == EXIT_RESTART_ME
