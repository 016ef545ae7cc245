"""The order inside one source: any position is an (epoch, window) at once, with nothing stored.

The tokens of a source are cut into pages of the recipe's longest sequence length. Each epoch permutes the
pages with a key of its own; the permuted pages form blocks, and inside a block the windows of all its pages
are permuted together, so the windows of a page do not follow each other. A window at length L is the tokens
[window * L, window * L + L + 1): the last token is only a target, and the first input of the next window.

A cursor says how far a source was read. When the sequence length changes, reading goes on at the next block
boundary: windows of two lengths never meet in one block, so no token is read twice in an epoch, and what is
skipped is known. stream.py joins this with blend.py; recipe/plan.py moves the cursors from stage to stage.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_smol import _csrc
from megatron_smol.errors import UserError

# A block of 4096 pages spreads a page's windows over thousands of others; 1/64 of an epoch bounds what a
# change of length may skip in a small source.
MAX_BLOCK_PAGES = 4096
MIN_BLOCKS = 64


@dataclass(frozen=True)
class Cursor:
    """How far a source was read: `position` windows of `seq_length` tokens since the start of epoch 0."""

    seq_length: int
    position: int


@dataclass(frozen=True)
class SourceOrder:
    """The read order of one source of `tokens` tokens."""

    name: str
    tokens: int
    page_length: int
    seed: int

    def __post_init__(self) -> None:
        if self.page_length < 1:
            raise UserError(f"page_length must be at least 1 token, got {self.page_length}")
        if self.tokens <= self.page_length:
            raise UserError(
                f"source '{self.name}' has {self.tokens} tokens, less than a page of data.page_length + 1 = "
                f"{self.page_length + 1}: add data, or lower page_length and the longest seq_length"
            )

    @property
    def pages(self) -> int:
        return (self.tokens - 1) // self.page_length

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that an epoch reads; the rest, less than a page, is never read."""
        return self.pages * self.page_length

    @property
    def block_pages(self) -> int:
        return max(1, min(MAX_BLOCK_PAGES, self.pages // MIN_BLOCKS))

    @cached_property
    def key(self) -> int:
        """64 bits of (seed, name), the same in every process and on every machine (unlike Python's hash)."""
        return int.from_bytes(
            hashlib.blake2b(f"{self.seed}\0{self.name}".encode(), digest_size=8).digest(), "little"
        )

    def windows_per_page(self, seq_length: int) -> int:
        if seq_length < 1 or self.page_length % seq_length:
            allowed = [n for n in range(1, self.page_length + 1) if self.page_length % n == 0]
            raise UserError(
                f"seq_length {seq_length} does not divide data.page_length {self.page_length}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
        return self.page_length // seq_length

    def windows_per_epoch(self, seq_length: int) -> int:
        return self.pages * self.windows_per_page(seq_length)

    def start(self) -> Cursor:
        """A cursor that has read nothing."""
        return self.start_of_epoch(0)

    def enter(self, cursor: Cursor, seq_length: int) -> tuple[Cursor, int]:
        """(cursor at `seq_length`, tokens skipped): a change of length goes on at the next block boundary."""
        per_page_before, per_page = (
            self.windows_per_page(cursor.seq_length),
            self.windows_per_page(seq_length),
        )
        if seq_length == cursor.seq_length:
            return cursor, 0
        epoch, done = divmod(cursor.position, self.pages * per_page_before)
        # Pages that were opened, rounded up to whole blocks. An epoch's last block may be shorter; its end
        # is the epoch's end, which is block 0 of the next.
        blocks = -(-done // (self.block_pages * per_page_before))
        pages = min(blocks * self.block_pages, self.pages)
        skipped_windows = pages * per_page_before - done
        position = (epoch * self.pages + pages) * per_page
        return Cursor(seq_length, position), skipped_windows * cursor.seq_length

    def start_of_epoch(self, epoch: int) -> Cursor:
        """A cursor at the start of an epoch, which `enter` takes to any length for free."""
        return Cursor(self.page_length, epoch * self.pages)

    def advance(self, cursor: Cursor, windows: int) -> Cursor:
        if windows < 0:
            raise ValueError(f"a cursor only moves forward, got {windows} windows")
        return Cursor(cursor.seq_length, cursor.position + windows)

    def layout(self, seq_length: int) -> tuple[int, int, int, int]:
        """What csrc/order.cpp needs to know: (pages, windows per page, pages per block, key)."""
        return self.pages, self.windows_per_page(seq_length), self.block_pages, self.key

    def lookup(
        self, seq_length: int, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch, window) of each position, a position being a cursor's: windows since epoch 0."""
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        return _csrc.lookup_windows(
            [self.layout(seq_length)], np.zeros(len(positions), dtype=np.uint16), positions
        )

    def locate(
        self, seq_length: int, epochs: NDArray[np.int64], windows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The position at which each window of an epoch is read: the inverse of `lookup`."""
        return _csrc.locate_windows(
            self.layout(seq_length),
            np.ascontiguousarray(epochs, dtype=np.int64),
            np.ascontiguousarray(windows, dtype=np.int64),
        )
