"""One save under way: tensors are written, hashed and published beside training.

`store.begin_save` starts one; the trainer asks `finish` at every step. What happens where:

  the training thread, all ranks   copy the tensors (checkpoint/staging.py), plan who writes what
  a thread of every rank           bring optimizer shards together, write this rank's file (checkpoint/durable.py)
  the training thread, all ranks   agree that every rank is done, exchange where each tensor lies
  a thread of rank 0               metadata, state.json, complete.json, rename into place, remove old checkpoints
  the training thread, all ranks   agree that it is published

A folder has a name of its own for every attempt, so nothing an interrupted save left is ever used again. Threads, not
processes: a killed rank leaves nothing behind that goes on writing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint.agree import everywhere, together
from megatron_smol.checkpoint.durable import DurableFile, without_crc32
from megatron_smol.errors import NO_ROOM, CheckpointError

_FELL_SHORT = (
    "inline_container",
    *(os.strerror(number) for number in NO_ROOM),
)
_NOT_A_TENSOR = re.compile(r"WeightsUnpickler error:\s*([^\n.]*)")
# state.json, complete.json, .metadata, metadata.json, common.pt, and the folder.
FILES_BESIDE_TENSORS = 6
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


class Saving:
    """A checkpoint being written. `path` is where it will be published; `stall_seconds`, what training waited for it so far."""

    def __init__(
        self,
        describe: Callable[[], tuple[dict[str, Any], Callable[[], None]]],
        path: Path,
        state: dict[str, Any],
        size_bytes: int,
        on_published: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the tensors and start to write; all ranks return or raise alike.

        describe: gives megatron-core's description of this rank's (copied) tensors, and what completes them in the
        writing thread. on_published: called on rank 0, in its thread, when the checkpoint is durable.
        """
        started = time.perf_counter()
        self.path = path
        # As text, now: what it describes goes on changing.
        self._state = json.dumps({"format": on_disk.FORMAT, **state}, indent=1) + "\n"
        self._on_published = on_published
        self._size_bytes = size_bytes
        self._writing = _make_folder(path, size_bytes)
        self._strategy = _Strategy("torch_dist", 1, thread_count=1)
        complete, error = None, None
        try:
            described, complete = describe()
            dist_checkpointing.save(
                described,
                str(self._writing),
                self._strategy,
                async_sharded_save=True,
                content_metadata=METADATA,
            )
        except (Exception, CheckpointException) as exception:
            error = exception
        self._agree(error)
        self._published = False
        self._thread = _Thread(lambda: self._write(complete))
        self.stall_seconds = time.perf_counter() - started

    def finish(self, wait: bool = True) -> bool:
        """Take the save a stage further where all ranks can, or to its end (`wait`); True when it is published.

        Collective: every rank calls it at the same step. Raises CheckpointError on all ranks when any failed;
        earlier checkpoints are then as they were.
        """
        started = time.perf_counter()
        try:
            while not self._published:
                if wait:
                    self._thread.join()
                elif not everywhere(not self._thread.is_alive()):
                    return False
                self._go_on()
            return True
        finally:
            self.stall_seconds += time.perf_counter() - started

    def _go_on(self) -> None:
        """From written to publishing, from publishing to published."""
        self._agree(self._thread.error)
        written = self._thread.result
        if written is None:
            self._published = True
            return
        all_written = [written] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(all_written, written)
        on_rank_0 = torch.distributed.get_rank() == 0
        self._thread = _Thread(lambda: self._publish(all_written) if on_rank_0 else None)

    def _agree(self, error: BaseException | None) -> None:
        try:
            with together("saving"):
                if error is not None:
                    reason = self._disk_or(reason_of(error))
                    raise CheckpointError(
                        f"saving {self.path} failed on rank {torch.distributed.get_rank()} ({socket.gethostname()}): "
                        f"{reason}; earlier checkpoints are intact"
                    ) from error
        except CheckpointError:
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(self._writing, ignore_errors=True)
            raise

    def _disk_or(self, reason: str) -> str:
        """What a write that fell short needs to be told with; torch's zip writer hides its errno."""
        if not any(sign in reason for sign in _FELL_SHORT):
            return reason
        free = shutil.disk_usage(self.path.parent).free
        return (
            f"a file could not be written to its end, the disk is full or limits the size of files ({reason}); "
            f"{free / 1e6:,.1f} MB are free there, a checkpoint needs up to {self._size_bytes / 1e6:,.1f} MB"
        )

    # --- in threads of their own -------------------------------------------------------------------------------

    def _write(self, complete: Callable[[], None] | None) -> tuple[list[WriteResult], dict[str, Any]]:
        """(where this rank's tensors lie, its files' sizes and hashes)."""
        if complete is not None:
            complete()
        return self._strategy.writer.write()

    def _publish(self, all_written: list[tuple[list[WriteResult], dict[str, Any]]]) -> None:
        self._strategy.writer.finish(self._strategy.metadata, [results for results, _ in all_written])
        save_config(CheckpointingConfig("torch_dist", 1), str(self._writing))
        (self._writing / on_disk.STATE).write_text(self._state)
        files = {name: file for _, described in all_written for name, file in described.items()}
        rest = [file.name for file in self._writing.iterdir() if file.name not in files]
        on_disk.publish(self._writing, self.path, files | on_disk.describe_files(self._writing, rest))
        self._on_published()


class _Thread(threading.Thread):
    """Runs `work`; what it returned or raised is there when it has ended."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        finally:
            del self._work


class _Strategy(torch_strategies.TorchDistSaveShardedStrategy):
    """megatron-core's planning; what it would hand to its own writer is kept for ours."""

    writer: _Writer
    metadata: Any  # of all tensors, on rank 0

    def _get_save_and_finalize_callbacks(self, writer: _Writer, planned: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


class _Writer(FileSystemWriterAsync):
    """One file a rank, written in this process. The stock writer forks helpers that outlive a killed rank and go on
    writing (and spawns a manager that imports everything: 6 s for a tiny model on two cores)."""

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        self._name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self._items = [(item, planner.resolve_data(item)) for item in plan.items]

    def write(self) -> tuple[list[WriteResult], dict[str, dict[str, Any]]]:
        """(where each tensor lies in the file, which is durable then; its size and hash); OSError and others as they come."""
        if not self._items:
            return [], {}
        with without_crc32(), DurableFile(Path(self.checkpoint_dir) / self._name) as stream:
            results = [self._write_one(stream, item, tensor) for item, tensor in self._items]
        return results, {self._name: stream.described}

    def _write_one(self, stream: Any, item: WriteItem, tensor: torch.Tensor) -> WriteResult:
        result: WriteResult = _write_item(
            self.transforms, stream, _alone(tensor), item, self._name, SerializationFormat.TORCH_SAVE
        )
        return result


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: torch.save writes the whole buffer that a view lies in."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).view(tensor.shape)


torch_strategies.FileSystemWriterAsync = _Writer


def _make_folder(path: Path, size_bytes: int) -> Path:
    """A new folder beside `path`, whose disk must have room."""
    attempt = [uuid.uuid4().hex[:8]]
    torch.distributed.broadcast_object_list(attempt, 0)
    writing = path.parent / f"{on_disk.WRITING}{path.name}-{attempt[0]}"
    with together(f"preparing to save {path}", only_rank=0) as mine:
        if mine:
            on_disk.make_folder(path.parent)
            _require_space(path.parent, size_bytes, torch.distributed.get_world_size() + FILES_BESIDE_TENSORS)
            writing.mkdir()
    return writing


def _require_space(folder: Path, needed: int, files: int) -> None:
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 1e6:,.1f} MB free and a checkpoint needs up to {needed / 1e6:,.1f} MB; "
            "free space there or set run_dir to another disk (earlier checkpoints are intact)"
        )
    if system.f_files and system.f_favail < files:  # 0: a file system without a fixed number
        raise CheckpointError(
            f"{folder} has room for {system.f_favail} more files (inodes) and a checkpoint needs up to {files}; "
            "remove files there or set run_dir to another disk (earlier checkpoints are intact)"
        )


def reason_of(error: BaseException) -> str:
    """One line for a person: torch wraps the cause of a failed rank in a BaseException with a traceback as text."""
    if failed := _of_the_system(error):
        return str(failed)
    text = str(error)
    if refused := _NOT_A_TENSOR.search(text):  # torch's own words advise to load it all the same
        return f"it holds more than tensors ({refused[1]}), is damaged or hostile, and was not loaded"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _of_the_system(error: BaseException | None) -> OSError | None:
    """What the system said before torch's zip writer, which cannot go on, said something else."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
