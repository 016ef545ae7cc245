"""What the C library does with memory that a conversion frees: kept for the next tensor, or given back at once.

By default glibc asks the system for each block of a tensor's size and returns it when it is freed. The system clears every
page of it first: for a conversion, which holds a few tensors and lets go of thousands, that is more work than the copying.
Nothing here does anything under another C library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_DEFAULT_BYTES, _KEEP_BYTES = 128 << 10, 1 << 30


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Within the block freed tensors' memory is used again; after it, it is given back."""
    _set_thresholds(_KEEP_BYTES)
    try:
        yield
    finally:
        _set_thresholds(_DEFAULT_BYTES)
        give_memory_back()


def give_memory_back() -> None:
    """Return all freed memory to the system."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_thresholds(size_bytes: int) -> None:
    with suppress(AttributeError, OSError):
        for threshold in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, size_bytes)
