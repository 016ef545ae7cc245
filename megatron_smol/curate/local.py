"""Runs the tasks of a phase on this machine, in this process or in spawned ones that all phases share.

In place of datatrove's local pool: that one waits for ever when the kernel kills a worker, and leaves workers and a
manager process behind when it is killed itself. What a task does, logs and marks as done is datatrove's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_smol.data.workers import exit_with_parent, one_thread_each
from megatron_smol.errors import RunError

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())


class Tasks:
    """`run` does one phase. workers: processes at once; 0: one a core."""

    def __init__(self, workers: int) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, what: str, blocks: list[Any], tasks: int, logs: Path) -> None:
        """Every task without a completion marker: a bar on a terminal, a line at the end elsewhere."""
        executor = LocalPipelineExecutor(pipeline=blocks, tasks=tasks, logging_dir=str(logs))
        ranks = executor.get_incomplete_ranks()
        with Progress(*_COLUMNS, console=self._console, disable=not self._console.is_terminal) as bar:
            task = bar.add_task(what, total=tasks, completed=tasks - len(ranks))
            for _ in self._ended(executor, ranks):
                bar.advance(task)
        if bar.disable:
            self.tell(f"{what}: {tasks} of {tasks} tasks")

    def tell(self, line: str) -> None:
        self._console.print(line, markup=False)

    def _ended(self, executor: LocalPipelineExecutor, ranks: list[int]) -> Iterator[None]:
        """One item a task that has ended. RunError when a worker died."""
        if min(self.workers, len(ranks)) <= 1:
            for rank in ranks:
                _run(executor, rank)
                yield
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers, multiprocessing.get_context("spawn"), initializer=_start
            )
        try:
            for ended in as_completed([self._pool.submit(_run, executor, rank) for rank in ranks]):
                ended.result()
                yield
        except BrokenProcessPool:
            raise RunError(
                "a worker process was killed (out of memory?); run the same command again with fewer --workers: "
                "what is finished is kept"
            ) from None


def _start() -> None:
    """Of a worker: ends with the command, which Ctrl-C is for."""
    one_thread_each()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run(executor: LocalPipelineExecutor, rank: int) -> None:
    """One task, its log in its file only; counts begin at zero, so the blocks are a copy."""
    logger.disable("datatrove")
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        deepcopy(executor)._run_for_rank(rank)
