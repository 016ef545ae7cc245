"""Large files written once, from beginning to end: a checksum is taken on the way, they are on the disk when closed.

Writing, then reading back for the checksum, then asking for a flush takes the disk's time after the processor's and holds the
file in the page cache, where the kernel slows a writer down as soon as a fifth of the memory waits for the disk. Here
the caller fills a block while a thread has the disk fetch the block before it from memory (O_DIRECT, no copy in the page
cache), so a file takes the longer of the two and not their sum.
Saves of a run (checkpoint/saving.py) and conversions (checkpoint/dist.py, checkpoint/shards.py) write tensors through it.
"""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_smol.checkpoint.folder import CHECKSUM

_BLOCK_BYTES, _BLOCKS = 8 << 20, 3  # one being filled, one written, one waiting; 16 MB at once gained nothing
_ALIGNMENT = 4096  # of what O_DIRECT takes: offsets, lengths and addresses, on every disk in use


class DurableFile(io.RawIOBase):
    """A new file. After `close` it is on the disk and `described` has what complete.json says of it.

    Left by an exception it is closed as it is, which whoever made its folder removes. OSError (a full disk, say) is raised by
    the write after the one that met it, or by `close`.
    """

    described: dict[str, Any]
    _descriptor = -1  # not opened: closing it then, as Python does with what it throws away, is nothing

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._descriptor = _open_past_the_cache(path)
        self._checksum = xxhash.xxh3_128()
        self._blocks = [mmap.mmap(-1, _BLOCK_BYTES) for _ in range(_BLOCKS)]  # at the beginning of a page
        self._busy: list[Future[None] | None] = [None for _ in self._blocks]
        self._current = self._filled = self._position = 0
        self._writing = ThreadPoolExecutor(1)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        bytes_ = memoryview(data).cast("B")
        taken = 0
        while taken < len(bytes_):
            part = bytes_[taken : taken + _BLOCK_BYTES - self._filled]
            self._blocks[self._current][self._filled : self._filled + len(part)] = part
            taken += len(part)
            self._filled += len(part)
            self._position += len(part)
            if self._filled == _BLOCK_BYTES:
                self._hand_over()
        return taken

    def close(self) -> None:
        """Wait for the rest, cut the last block's filling off, flush."""
        if self.closed or self._descriptor < 0:
            return
        try:
            self._hand_over()
            for block in range(_BLOCKS):
                self._wait_for(block)
            os.ftruncate(self._descriptor, self._position)
            os.fsync(self._descriptor)
            self.described = {"bytes": self._position, CHECKSUM: self._checksum.hexdigest()}
        finally:
            self._release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _hand_over(self) -> None:
        block, size = self._blocks[self._current], self._filled
        at = self._position - size
        with memoryview(block) as view:
            self._checksum.update(view[:size])
        self._busy[self._current] = self._writing.submit(self._put, block, size, at)
        self._current, self._filled = (self._current + 1) % _BLOCKS, 0
        self._wait_for(self._current)

    def _wait_for(self, block: int) -> None:
        if work := self._busy[block]:
            work.result()
        self._busy[block] = None

    def _put(self, block: mmap.mmap, size: int, at: int) -> None:
        done, padded = 0, size + -size % _ALIGNMENT
        with memoryview(block) as view:
            while done < size:
                try:
                    done += os.pwrite(self._descriptor, view[done:padded], at + done)
                except OSError as error:
                    if error.errno != errno.EINVAL or not _go_through_the_cache(self._descriptor):
                        raise

    def _release(self) -> None:
        self._writing.shutdown(cancel_futures=True)
        os.close(self._descriptor)
        for block in self._blocks:
            block.close()
        super().close()


def _open_past_the_cache(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some kernels make the file before they refuse the flag
        return os.open(path, flags, 0o666)


def _go_through_the_cache(descriptor: int) -> bool:
    """For disks that refuse O_DIRECT, or this alignment, at the first write only; False if that was not it."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


@contextmanager
def without_crc32() -> Iterator[None]:
    """For torch.save into such a file: the file's checksum is there, another of every tensor finds nothing more."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
