"""Carries an ablation out on this machine: every run by `smol train`, which continues what was interrupted; then evaluation.

`jobs` runs at a time, each a process of its own. A run whose earlier process still trains, because only this command was
killed, is waited for. `array` gives the runs to Slurm instead.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console

from megatron_smol.ablate.config import Ablation, Evaluation
from megatron_smol.ablate.recipes import Run
from megatron_smol.data.files import write_whole
from megatron_smol.errors import EXIT_RESTART_ME, RunError
from megatron_smol.flock import locked_file
from megatron_smol.recipe.load import dump_recipe
from megatron_smol.slurm.legs import position
from megatron_smol.train.lock import LOCK

_LOOK_AGAIN_SECONDS = 0.5


def carry_out(config: Ablation, runs: list[Run], console: Console) -> None:
    """Train and evaluate what is not done yet. Raises RunError when a run fails; what is done stays."""
    work = _Work(config, runs, console)
    with _passed_on(work.children), ThreadPoolExecutor(config.jobs) as pool:
        futures = [pool.submit(work.one, number, run) for number, run in enumerate(runs, 1)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            _give_up(futures, work.children)
            raise


def _give_up(futures: list[Future[None]], children: _Children) -> None:
    for future in futures:
        future.cancel()
    children.end()


@contextmanager
def _passed_on(children: _Children) -> Iterator[None]:
    """A stop signal to this command goes to its runs, which save themselves."""

    def leave(number: int, frame: FrameType | None) -> None:
        children.end()
        raise RunError("stopped by a signal; the runs have saved themselves, and the same command goes on")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Children:
    """The processes that are running now."""

    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, command: list[str], log: Path) -> int:
        with log.open("ab") as stream:
            with self.lock:
                if self.ended:
                    return EXIT_RESTART_ME
                process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
                self.running.add(process)
            try:
                return process.wait()
            finally:
                self.running.discard(process)

    def end(self) -> None:
        self.ended = True
        for process in list(self.running):
            process.terminate()


@dataclass
class _Work:
    config: Ablation
    runs: list[Run]
    console: Console
    children: _Children = field(default_factory=_Children)
    took: list[float] = field(default_factory=list)  # seconds of the runs trained here

    def one(self, number: int, run: Run) -> None:
        where = f"run {number} of {len(self.runs)}: {run.name}"
        if not position(run.plan).finished:
            self._wait_for_earlier(run, where)
        if position(run.plan).finished:
            self._say(f"{where}: done")
        else:
            self._say(f"{where}: training")
            started = time.monotonic()
            self._call(train_command(self.config, run), where, run.recipe.run_path / "train.log")
            self.took.append(time.monotonic() - started)
            self._say(f"{where}: trained in {self.took[-1]:,.0f} s{self._left()}")
        if self.config.eval is not None:
            log = run.recipe.run_path / "eval.log"
            self._call(evaluate_command(self.config.eval, run), f"{where}: evaluation", log)

    def _left(self) -> str:
        todo = sum(not position(run.plan).finished for run in self.runs)
        seconds = todo * sum(self.took) / len(self.took) / self.config.jobs
        return f", about {seconds / 60:,.0f} min left" if todo else ""

    def _wait_for_earlier(self, run: Run, where: str) -> None:
        """Until no process trains in the run folder any more; `smol train` holds this lock."""
        path, told = run.recipe.run_path / LOCK, False
        while path.is_file():
            if lock := locked_file(path):
                lock.close()
                return
            if not told:
                self._say(f"{where}: an earlier process is still training it; waiting for its end")
                told = True
            time.sleep(_LOOK_AGAIN_SECONDS)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def _call(self, command: list[str], what: str, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        code = self.children.call(command, log)
        if code == EXIT_RESTART_ME:
            raise RunError(f"{what} was stopped by a signal and has saved itself; the same command goes on")
        if code:
            last = log.read_text().strip().splitlines()[-1:]
            raise RunError(
                f"{what} failed with exit code {code}: {' '.join(last)} (all of it: {log}); the same command goes on"
            )


def recipe_file(config: Ablation, run: Run) -> Path:
    """Where the recipe of a run is written."""
    path = config.output / "recipes" / f"{run.recipe.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, dump_recipe(run.recipe))
    return path


def train_command(config: Ablation, run: Run) -> list[str]:
    """`smol train` of one run, under torchrun when it has several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.ranks)]
    smol = ["-m", "megatron_smol", "train", str(recipe_file(config, run))]
    return [sys.executable, *(launcher if config.ranks else []), *smol]


def evaluate_command(asked: Evaluation, run: Run) -> list[str]:
    """`smol eval` of one run; it leaves out by itself what evals.jsonl already has."""
    command = [sys.executable, "-m", "megatron_smol", "eval", str(run.recipe.run_path)]
    command += ["--tasks", ",".join(asked.tasks)]
    command += ["--data-dir", str(asked.data_dir)] if asked.data_dir else []
    return command + (["--limit", str(asked.limit)] if asked.limit else [])
