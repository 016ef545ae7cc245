"""Runs preprocessing tasks (data/encode.py) in this process or in `workers` spawned ones."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_exit

from megatron_smol.data.encode import Record, Settings, Task
from megatron_smol.errors import DataError

_settings: Settings | None = None  # of a worker process


class Workers:
    """`run` yields records as tasks finish; at most two tasks a worker are waiting, so a long list costs
    nothing."""

    def __init__(self, count: int, settings: Settings) -> None:
        one_thread_each()
        self._settings = settings
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            self._pool = ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(settings,)
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Iterable[Task]) -> Iterator[Record]:
        if self._pool is None:
            yield from (task.run(self._settings) for task in tasks)
            return
        waiting: set[Future[Record]] = set()
        try:
            for task in tasks:
                waiting.add(self._pool.submit(_run, task))
                if len(waiting) >= 2 * self._count:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed (out of memory?); run the same command again with fewer "
                "--workers: what is finished is kept"
            ) from None


def one_thread_each() -> None:
    """`--workers` is the number of cores used: the tokenizers must not start threads of their own."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _start(settings: Settings) -> None:
    global _settings
    _settings = settings
    one_thread_each()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """A worker that outlives a killed parent would write beside the workers of the restarted command."""
    parent = multiprocessing.parent_process()
    with contextlib.suppress(OSError):
        wait_for_exit([parent.sentinel] if parent else [])
    os._exit(1)


def _run(task: Task) -> Record:
    assert _settings is not None
    return task.run(_settings)
