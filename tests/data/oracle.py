"""The data order again, in slow and plain Python, written from the description in data/order.py and
data/blend.py.

It shares no code with the package: no numpy, no C++, sources that walk from block to block, blends by scanning
all sources, stages by walking the recipe.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

MASK = 2**64 - 1


def mix(x: int) -> int:
    """splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@lru_cache(1000)
def network(size: int, key: int) -> Callable[[int], int]:
    """A keyed permutation of [0, size): a Feistel network on the next power of two, cycle-walked."""
    bits = (size - 1).bit_length()
    left_bits, right_bits = bits // 2, bits - bits // 2
    rounds = 24 if bits < 16 else 10
    keys = [mix(key + 0x9E3779B97F4A7C15 * (i + 1) & MASK) for i in range(rounds)]

    def once(value: int) -> int:
        left, right = value >> right_bits, value % 2**right_bits
        for i in range(0, rounds, 2):
            left ^= mix(right ^ keys[i]) % 2**left_bits
            right ^= mix(left ^ keys[i + 1]) % 2**right_bits
        return left << right_bits | right

    def walk(value: int) -> int:
        value = once(value)
        while value >= size:
            value = once(value)
        return value

    return walk


def permute(size: int, key: int, indices: Iterable[int]) -> list[int]:
    """A keyed permutation of [0, size) at some indices."""
    return [network(size, key)(index) for index in indices]


def name_key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


class Source:
    """Reads a source window by window: the open block, and where in it."""

    def __init__(self, name: str, tokens: int, page_length: int, seed: int) -> None:
        self.pages = (tokens - 1) // page_length
        self.page_length = self.seq_length = page_length
        self.block_pages = max(1, min(4096, self.pages // 64))
        self.key = name_key(seed, name)
        self.epoch = 0
        self.finished_pages = 0  # of this epoch, in blocks that are closed
        self.used = 0  # windows of the open block

    @property
    def per_page(self) -> int:
        return self.page_length // self.seq_length

    @property
    def pages_in_block(self) -> int:
        return min(self.block_pages, self.pages - self.finished_pages)

    def _close_block(self) -> None:
        self.finished_pages, self.used = self.finished_pages + self.pages_in_block, 0
        if self.finished_pages == self.pages:
            self.epoch, self.finished_pages = self.epoch + 1, 0

    def enter(self, seq_length: int) -> int:
        """Change the length; returns the tokens that are skipped (the rest of the open block)."""
        skipped = 0
        if seq_length != self.seq_length:
            if self.used:
                skipped = (self.pages_in_block * self.per_page - self.used) * self.seq_length
                self._close_block()
            self.seq_length = seq_length
        return skipped

    def read(self) -> tuple[int, int]:
        """(epoch, window) of the next window."""
        number = self.finished_pages // self.block_pages
        in_block = network(
            self.pages_in_block * self.per_page, mix(mix(mix(self.key ^ 0x626C6F636B) ^ self.epoch) ^ number)
        )
        place, part = divmod(in_block(self.used), self.per_page)
        in_epoch = network(self.pages, mix(mix(self.key ^ 0x70616765) ^ self.epoch))
        found = self.epoch, in_epoch(self.finished_pages + place) * self.per_page + part
        self.skip(1)
        return found

    def skip(self, windows: int) -> None:
        """Read so many windows without looking."""
        epochs, windows = divmod(windows, self.pages * self.per_page)
        self.epoch += epochs
        while windows:
            step = min(windows, self.pages_in_block * self.per_page - self.used)
            self.used, windows = self.used + step, windows - step
            if self.used == self.pages_in_block * self.per_page:
                self._close_block()


def blend(weights: dict[str, Fraction], samples: int) -> list[str]:
    """Whose turn each sample is: the earliest deadline among the sources that may come, names breaking
    ties.
    """
    names = sorted(name for name in weights if weights[name] > 0)
    shares = {name: (weights[name].numerator, weights[name].denominator) for name in names}
    taken = dict.fromkeys(names, 0)
    turns = []
    for slot in range(samples):
        due = []
        for name in names:
            a, d = shares[name]
            if taken[name] * d // a <= slot:  # may come
                due.append((-(-(taken[name] + 1) * d // a), name))
        turn = min(due)[1]
        taken[turn] += 1
        turns.append(turn)
    return turns


class Turns:
    """A blend far into a run: it repeats after the least common denominator of its weights."""

    def __init__(self, weights: dict[str, Fraction]) -> None:
        self.period = math.lcm(*(weight.denominator for weight in weights.values()))
        self.cycle = blend(weights, self.period)

    def __getitem__(self, sample: int) -> str:
        return self.cycle[sample % self.period]

    def counts(self, samples: int) -> Counter[str]:
        turns, rest = divmod(samples, self.period)
        counts = Counter(self.cycle[:rest])
        for name, count in Counter(self.cycle).items():
            counts[name] += turns * count
        return counts


@dataclass
class Stage:
    """A stage of a recipe as it was walked; `sources` are as they stand at its start."""

    name: str
    parent: str | None
    start_step: int
    steps: int
    start_tokens: int
    seq_length: int
    global_batch: int
    turns: Turns
    sources: dict[str, Source]
    read: Counter[str]  # tokens by source along the lineage, before the stage
    skipped: dict[str, int]

    def after(self, samples: int) -> tuple[dict[str, Source], Counter[str]]:
        """Sources, and tokens read along the lineage, when so many samples of the stage are read."""
        sources, read = copy.deepcopy(self.sources), Counter(self.read)
        for name, count in self.turns.counts(samples).items():
            sources[name].skip(count)
            read[name] += count * self.seq_length
        return sources, read

    def row(self, sample: int) -> tuple[str, int, int]:
        """(source, epoch, window) of a sample."""
        name = self.turns[sample]
        source = copy.copy(self.sources[name])
        source.skip(self.turns.counts(sample)[name])
        return name, *source.read()


def half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def walk(recipe: dict[str, Any]) -> list[Stage]:
    """The stages of a recipe, as a YAML file says them: lengths by `tokens`, branches by `from`."""
    training, stages = recipe["training"], []
    page_length = max(stage.get("seq_length", training["seq_length"]) for stage in recipe["stages"])
    trunk = None
    for entry in recipe["stages"]:
        seq_length = entry.get("seq_length", training["seq_length"])
        global_batch = entry.get("global_batch", training["global_batch"])
        sources = {
            name: Source(name, int(source["tokens"]), page_length, recipe["data"]["seed"])
            for name, source in recipe["sources"].items()
        }
        read: Counter[str] = Counter()
        parent, start_step, start_tokens = trunk, 0, 0
        if "from" in entry:
            parent = next(stage for stage in stages if stage.name == entry["from"]["stage"])
        if parent is not None:
            per_step = parent.seq_length * parent.global_batch
            back = in_steps(entry["from"]["before_end"], per_step, parent.steps) if "from" in entry else 0
            done = parent.steps - back
            start_step, start_tokens = parent.start_step + done, parent.start_tokens + done * per_step
            sources, read = parent.after(done * parent.global_batch)
        steps = in_steps(entry["tokens"], seq_length * global_batch)
        weights = {name: Fraction(weight) for name, weight in entry["mixture"].items()}
        skipped = {name: sources[name].enter(seq_length) for name in weights}
        name = parent.name if parent else None
        stage = Stage(
            entry["name"],
            name,
            start_step,
            steps,
            start_tokens,
            seq_length,
            global_batch,
            Turns(weights),
            sources,
            read,
            skipped,
        )
        stages.append(stage)
        if "from" not in entry:
            trunk = stage
    return stages


def in_steps(amount: str | int, tokens_per_step: int, before: int | None = None) -> int:
    """An amount such as "12 steps" or 4711 (tokens), as steps; with `before` it is counted back from that step."""
    if isinstance(amount, str):
        return int(amount.removesuffix(" steps"))
    if before is None:
        return half_up(amount, tokens_per_step)
    return before - half_up(before * tokens_per_step - amount, tokens_per_step)
