"""The coverage law in one source, the keyed permutations behind it, cursors across changes of length."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_smol import _csrc
from megatron_smol.data.order import Cursor, SourceOrder
from megatron_smol.errors import UserError

from . import oracle


def permute(size: int, key: int) -> list[int]:
    return _csrc.permute(size, key, np.arange(size)).tolist()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@example(1, 0)
@example(2, 5)
@example(3, 5)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(size, key)) == list(range(size))


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 10**6])
def test_large_permutation_is_a_bijection(size: int) -> None:
    assert np.array_equal(np.sort(_csrc.permute(size, 8, np.arange(size))), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(st.integers(2**40, 2**62), st.integers(0, 2**64 - 1))
@example(2**62, 1)
def test_huge_permutation_stays_in_range_without_collisions(size: int, key: int) -> None:
    image = _csrc.permute(size, key, np.concatenate([np.arange(1000), size - 1 - np.arange(1000)]))
    assert image.min() >= 0 and image.max() < size
    assert len(set(image.tolist())) == 2000
    assert image[::50].tolist() == oracle.permute(
        size, key, [*range(1000), *range(size - 1, size - 1001, -1)][::50]
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_the_inverse_leads_back(size: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    assert np.array_equal(_csrc.permute(size, key, _csrc.permute(size, key, index), inverse=True), index)
    assert np.array_equal(_csrc.permute(size, key, _csrc.permute(size, key, index, inverse=True)), index)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_window_is_located_where_it_is_read(data: st.DataObject) -> None:
    order = data.draw(sources())
    seq_length = data.draw(st.sampled_from(lengths(order)))
    positions = np.arange(2 * order.windows_per_epoch(seq_length))
    assert np.array_equal(order.locate(seq_length, *order.lookup(seq_length, positions)), positions)


def chi_square_deviations(observed: np.ndarray, expected: float, freedom: int) -> float:
    """How many standard deviations the chi-square statistic lies from its mean."""
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_every_order_of_a_few_elements_is_equally_likely(size: int) -> None:
    keys = 200 * math.factorial(size)
    counts = Counter(tuple(permute(size, oracle.mix(key))) for key in range(keys))
    observed = np.array([*counts.values(), *[0] * (math.factorial(size) - len(counts))])
    assert abs(chi_square_deviations(observed, 200, math.factorial(size) - 1)) < 5


@pytest.mark.parametrize("size", [7, 16, 33, 64])
def test_every_element_and_pair_goes_everywhere_equally_often(size: int) -> None:
    keys = 20 * size * size
    images = np.array([permute(size, oracle.mix(key)) for key in range(keys)])  # [keys, size]
    position = np.repeat(np.arange(size)[None], keys, 0)
    landed = np.bincount((position * size + images).ravel(), minlength=size * size)
    assert abs(chi_square_deviations(landed, keys / size, (size - 1) ** 2)) < 5
    pairs = np.bincount(images[:, 0] * size + images[:, 1], minlength=size * size).reshape(size, size)
    apart = pairs[~np.eye(size, dtype=bool)]
    assert abs(chi_square_deviations(apart, keys / apart.size, apart.size - 1)) < 5


def test_large_permutation_looks_random() -> None:
    size, n = 10**12, 200_000
    image = _csrc.permute(size, 8, np.arange(n))
    tiles = np.bincount(image * 100 // size, minlength=100)
    assert abs(chi_square_deviations(tiles, n / 100, 99)) < 5
    followers = np.bincount((image[:-1] * 10 // size) * 10 + image[1:] * 10 // size, minlength=100)
    assert abs(chi_square_deviations(followers, (n - 1) / 100, 99)) < 5


def test_keys_do_not_depend_on_the_process_and_differ_by_seed_and_name() -> None:
    code = "from megatron_smol.data.order import SourceOrder as S; print(S('web', 10**6, 64, 8).key)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(shown) == SourceOrder("web", 10**6, 64, 8).key == oracle.name_key(8, "web")
    keys = {SourceOrder(name, 10**6, 64, seed).key for name in ("web", "code", "1web") for seed in (0, 1, 11)}
    assert len(keys) == 9


@st.composite
def sources(draw: st.DrawFn) -> SourceOrder:
    """Small sources of every kind: one page, blocks of one page, long blocks with a short last one."""
    page_length = draw(st.sampled_from([1, 4, 12, 16]))
    pages = draw(st.one_of(st.integers(1, 70), st.integers(128, 420)))
    remainder = draw(st.integers(1, page_length))
    return SourceOrder("s", pages * page_length + remainder, page_length, draw(st.integers(0, 5)))


def lengths(order: SourceOrder) -> list[int]:
    return [n for n in range(1, order.page_length + 1) if order.page_length % n == 0]


@settings(max_examples=100, deadline=None)
@given(sources(), st.data())
def test_an_epoch_reads_each_window_once_and_the_next_in_another_order(
    order: SourceOrder, data: st.DataObject
) -> None:
    seq_length = data.draw(st.sampled_from(lengths(order)))
    per_epoch = order.windows_per_epoch(seq_length)
    epoch, window = order.lookup(seq_length, np.arange(3 * per_epoch))
    assert epoch.tolist() == [i // per_epoch for i in range(3 * per_epoch)]
    passes = window.reshape(3, per_epoch)
    assert (np.sort(passes, axis=1) == np.arange(per_epoch)).all()
    assert (int(window.max()) + 1) * seq_length + 1 <= order.tokens
    if per_epoch > 12:
        assert not np.array_equal(passes[0], passes[1]) and not np.array_equal(passes[1], passes[2])


Script = list[tuple[int, int]]  # (sequence length, windows to read at it) in turn


@st.composite
def scripts(draw: st.DrawFn, order: SourceOrder) -> Script:
    script = []
    for _ in range(draw(st.integers(1, 6))):
        seq_length = draw(st.sampled_from(lengths(order)))
        per_page = order.page_length // seq_length
        block = order.block_pages * per_page
        near = draw(st.sampled_from([0, 1, block, 3 * block, order.pages * per_page]))
        script.append((seq_length, max(0, min(near + draw(st.integers(-2, 2)), 8000))))
    return script


@settings(max_examples=300, deadline=None)
@given(sources(), st.data())
def test_coverage_across_changes_of_length(order: SourceOrder, data: st.DataObject) -> None:
    """Row by row against the oracle; no token twice in an epoch, nothing missing but what was skipped."""
    script = data.draw(scripts(order))
    plain = oracle.Source(order.name, order.tokens, order.page_length, order.seed)
    cursor, skipped_tokens = order.start(), 0
    times_read: dict[int, np.ndarray] = {}
    for seq_length, windows in script:
        cursor, skipped = order.enter(cursor, seq_length)
        assert skipped == plain.enter(seq_length)
        skipped_tokens += skipped
        epochs, found = order.lookup(seq_length, cursor.position + np.arange(windows))
        assert [*zip(epochs.tolist(), found.tolist(), strict=True)] == [plain.read() for _ in range(windows)]
        for epoch, window in zip(epochs.tolist(), found.tolist(), strict=True):
            seen = times_read.setdefault(epoch, np.zeros(order.tokens_per_epoch, np.int64))
            seen[window * seq_length : (window + 1) * seq_length] += 1
        cursor = order.advance(cursor, windows)
    assert all(seen.max() <= 1 for seen in times_read.values())
    passed = cursor.position * cursor.seq_length  # tokens between the start and the cursor
    assert passed == sum(int(seen.sum()) for seen in times_read.values()) + skipped_tokens


def test_entering_is_free_at_the_start_and_on_block_boundaries() -> None:
    order = SourceOrder("s", 1000 * 16 + 1, 16, 8)
    assert order.block_pages == 15
    assert order.enter(order.start(), 4) == (Cursor(4, 0), 0)
    assert order.enter(Cursor(4, 60), 8) == (Cursor(8, 30), 0)
    assert order.enter(Cursor(4, 4000), 16) == (Cursor(16, 1000), 0)
    assert order.enter(Cursor(4, 61), 4) == (Cursor(4, 61), 0)
    assert order.enter(Cursor(4, 61), 8) == (Cursor(8, 60), 59 * 4)


def test_the_short_last_block_of_an_epoch_ends_with_the_epoch() -> None:
    order = SourceOrder("s", 1000 * 16 + 1, 16, 8)  # 66 blocks of 15 pages and one of 10
    assert order.enter(Cursor(4, 3961), 8) == (Cursor(8, 2000), 39 * 4)
    assert order.enter(Cursor(4, 4000 + 3961), 8) == (Cursor(8, 4000), 39 * 4)


def test_a_change_of_length_costs_at_most_a_64th_of_an_epoch() -> None:
    for pages in (64, 1000, 300_000):
        order = SourceOrder("s", pages * 16 + 1, 16, 8)
        assert order.enter(Cursor(4, 1), 8)[1] < order.tokens_per_epoch / 64
    assert SourceOrder("s", 10**12, 8192, 8).block_pages == 4096


def test_windows_of_a_page_are_spread_over_their_block() -> None:
    order = SourceOrder("s", 10**10, 8192, 8)
    _, window = order.lookup(2048, np.arange(4096 * 4))
    pages = window // 4
    assert len(set(pages.tolist())) == 4096
    assert (pages[1:] == pages[:-1]).sum() < 20  # about one pair is expected by chance


def test_trillions_of_tokens() -> None:
    order = SourceOrder("s", 10**13, 8192, 8)
    positions = np.array([0, 2**31, 2**32 + 1, 2**60])
    epoch, window = order.lookup(2048, positions)
    assert epoch.tolist() == [p // order.windows_per_epoch(2048) for p in positions.tolist()]
    assert (window >= 0).all() and (window < order.windows_per_epoch(2048)).all()


def test_any_array_of_positions_is_taken() -> None:
    order = SourceOrder("s", 10**6, 64, 8)
    positions = np.arange(0, 4000, dtype=np.int32)[::-3]
    assert np.array_equal(order.lookup(16, positions)[1], order.lookup(16, np.arange(4000))[1][::-3])
    assert all(len(part) == 0 for part in order.lookup(16, np.array([], dtype=np.int64)))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="source 'tiny' has 64 tokens"):
        SourceOrder("tiny", 64, 64, 8)
    with pytest.raises(UserError, match="page_length must be at least 1"):
        SourceOrder("s", 64, 0, 8)
    order = SourceOrder("s", 1000, 12, 8)
    with pytest.raises(UserError, match=r"seq_length 5 does .*page_length 12; allowed: 1, 2, 3, 4, 6, 12"):
        order.enter(order.start(), 5)
    with pytest.raises(ValueError, match="positions start at 0, got -1"):
        order.lookup(4, np.array([-1]))
    with pytest.raises(ValueError, match="only moves forward"):
        order.advance(order.start(), -1)


def test_arguments_are_checked_before_memory_is_touched() -> None:
    layout = SourceOrder("s", 1000, 12, 8).layout(4)
    with pytest.raises(ValueError, match="differ in length"):
        _csrc.lookup_windows([layout], np.zeros(2, np.uint16), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="names source 1 of 1"):
        _csrc.lookup_windows([layout], np.ones(1, np.uint16), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="2\\^62 windows"):
        _csrc.lookup_windows([(0, 1, 1, 0)], np.zeros(1, np.uint16), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="window 249 of epoch 0 does not exist: an epoch has 249 windows"):
        _csrc.locate_windows(layout, np.array([0]), np.array([249]))
    with pytest.raises(ValueError, match="of epoch -1 does not exist"):
        _csrc.locate_windows(layout, np.array([-1]), np.array([0]))
    with pytest.raises(ValueError, match="differ in length"):
        _csrc.locate_windows(layout, np.zeros(2, np.int64), np.zeros(3, np.int64))
    for ids, starts in (([5], [0, 2]), ([-1], [0, 2]), ([0], [0, 3]), ([0], [0])):
        with pytest.raises(ValueError, match=r"not in the vocabulary of 1|do not fit"):
            _csrc.spell(np.array(ids, np.int32), b"ab", np.array(starts))
    with pytest.raises(ValueError, match="not in"):
        _csrc.permute(3, 0, np.array([3]))
    for size in (0, 2**62 + 1):
        with pytest.raises(ValueError, match="1 to 2\\^62"):
            _csrc.permute(size, 0, np.array([], dtype=np.int64))
    with pytest.raises(TypeError):
        _csrc.lookup_windows([layout], np.zeros(1, np.int64), np.zeros(1, np.float64))
