"""The data order again, in slow and plain Python, written from the description in data/order.py and
data/blend.py.

It shares no code with the package: no numpy, no C++, permutations as explicit lists, blends by scanning all
sources.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from fractions import Fraction

MASK = 2**64 - 1


def mix(x: int) -> int:
    """splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permute(size: int, key: int, indices: Iterable[int]) -> list[int]:
    """A keyed permutation of [0, size) at some indices: a Feistel network on the next power of two, cycle-
    walked.
    """
    bits = (size - 1).bit_length()
    left_bits, right_bits = bits // 2, bits - bits // 2
    rounds = 24 if bits < 16 else 10
    keys = [mix(key + 0x9E3779B97F4A7C15 * (i + 1) & MASK) for i in range(rounds)]

    def network(value: int) -> int:
        left, right = value >> right_bits, value % 2**right_bits
        for i in range(0, rounds, 2):
            left ^= mix(right ^ keys[i]) % 2**left_bits
            right ^= mix(left ^ keys[i + 1]) % 2**right_bits
        return left << right_bits | right

    out = []
    for value in indices:
        value = network(value)
        while value >= size:
            value = network(value)
        out.append(value)
    return out


def permutation(size: int, key: int) -> list[int]:
    return permute(size, key, range(size))


def name_key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


class Source:
    """Reads a source window by window, block by block, and keeps a list of what each epoch has left."""

    def __init__(self, name: str, tokens: int, page_length: int, seed: int) -> None:
        self.pages = (tokens - 1) // page_length
        self.page_length = page_length
        self.block_pages = max(1, min(4096, self.pages // 64))
        self.key = name_key(seed, name)
        self.epoch = 0
        self.blocks = self._blocks_of_epoch()
        self.queue: list[int] = []  # windows left in the open block
        self.seq_length = page_length

    def _blocks_of_epoch(self) -> list[list[int]]:
        pages = permutation(self.pages, mix(mix(self.key ^ 0x70616765) ^ self.epoch))
        return [pages[i : i + self.block_pages] for i in range(0, self.pages, self.block_pages)]

    def _open_block(self) -> None:
        if not self.blocks:
            self.epoch += 1
            self.blocks = self._blocks_of_epoch()
        number = -(-self.pages // self.block_pages) - len(self.blocks)
        pages = self.blocks.pop(0)
        per_page = self.page_length // self.seq_length
        windows = [page * per_page + i for page in pages for i in range(per_page)]
        key = mix(mix(mix(self.key ^ 0x626C6F636B) ^ self.epoch) ^ number)
        self.queue = [windows[i] for i in permutation(len(windows), key)]

    def enter(self, seq_length: int) -> int:
        """Change the length; returns the tokens that are skipped (the rest of the open block)."""
        skipped = 0
        if seq_length != self.seq_length:
            skipped = len(self.queue) * self.seq_length
            self.queue, self.seq_length = [], seq_length
        return skipped

    def read(self) -> tuple[int, int]:
        """(epoch, window) of the next window."""
        if not self.queue:
            self._open_block()
        return self.epoch, self.queue.pop(0)


def blend(weights: dict[str, Fraction], samples: int) -> list[str]:
    """Whose turn each sample is: the earliest deadline among the sources that may come, names breaking
    ties.
    """
    names = sorted(name for name in weights if weights[name] > 0)
    taken = dict.fromkeys(names, 0)
    turns = []
    for slot in range(samples):
        due = []
        for name in names:
            may_come = math.floor(taken[name] / weights[name]) <= slot
            if may_come:
                due.append((math.ceil((taken[name] + 1) / weights[name]), name))
        turn = min(due)[1]
        taken[turn] += 1
        turns.append(turn)
    return turns
