"""Ranks for tests: `run_ranks(fn, n)` runs `fn(*args)` on n gloo ranks and gives back what each returned; and kills."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

RANK_TIMEOUT_S = 300


# Below the range from which the system gives ports of its own choice, so that between this and the meeting of the ranks no
# listener of another test can take it; a block for each worker of pytest-xdist.
_PORTS_PER_WORKER = 4000
_FIRST_PORT = 12000 + _PORTS_PER_WORKER * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 5)
_tried = itertools.count(os.getpid())


def free_port() -> int:
    while True:
        port = _FIRST_PORT + next(_tried) % _PORTS_PER_WORKER
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call `function(*args)` in `ranks` processes of one process group; a failure on any rank fails the test.

    `function` must be importable (a module's top level). The ranks are forked from one server that has
    imported the package already, so that a test does not pay the imports again.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    results: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, args, rank, ranks, port, results), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(_collect(results, processes))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(ranks)]


def _collect(results: Any, processes: list[Any]) -> list[tuple[int, Any]]:
    found = []
    for _ in processes:
        try:
            rank, value, error = results.get(timeout=RANK_TIMEOUT_S)
        except queue.Empty:
            raise AssertionError(f"no answer from a rank in {RANK_TIMEOUT_S} s") from None
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        found.append((rank, value))
    return found


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, ranks: int, port: int, results: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        SMOL_DEVICE="cpu",
    )
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def stop_after(allowed: int, patch: pytest.MonkeyPatch) -> None:
    """So many files and folders may be removed or renamed, then comes the kill."""
    left = allowed

    def counted(real: Any) -> Any:
        def act(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return act

    for name in ("unlink", "rmdir", "replace", "rename"):
        patch.setattr(os, name, counted(getattr(os, name)))


def document_mask(tokens: Any, eod_id: int) -> Any:
    """[b, 1, s, s], from [b, s] ids: a document ends with `eod_id`, which belongs to the document it ends."""
    from megatron_smol.model.attention import documents_mask

    ends = tokens.eq(eod_id).int()
    return documents_mask(ends.cumsum(1) - ends)  # number of documents that ended before this token
