"""Near duplicates are found at the rate that theory says, and the first of each group stays."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_smol.curate.duplicates import exact_keys, first_of_group, found_share, minhash_keys

WORDS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=7)) for n in range(20_000)]


def pair(similarity: float, size: int, chance: random.Random) -> tuple[bytes, bytes]:
    """Two texts whose sets of words overlap to `similarity` (as nearly as whole words allow)."""
    shared = round(size * 2 * similarity / (1 + similarity))
    words = chance.sample(WORDS, 2 * size - shared)
    return " ".join(words[:size]).encode(), " ".join(words[size - shared :]).encode()


@pytest.mark.parametrize(("bands", "rows"), [(1, 10), (14, 8)])
@pytest.mark.parametrize("similarity", [0.7, 0.8, 0.9, 0.95])
def test_pairs_are_found_at_the_rate_of_theory(bands: int, rows: int, similarity: float) -> None:
    """Within four standard errors of s^rows per band, over words in place of n-grams (so that s is known)."""
    chance, tries = random.Random(0), 400
    found = 0
    for seed in range(tries):
        keys = minhash_keys(list(pair(similarity, 400, chance)), 1, bands, rows, seed)
        found += bool((keys[0] == keys[1]).any())
    expected = found_share(similarity, bands, rows)
    error = (expected * (1 - expected) / tries) ** 0.5
    assert abs(found / tries - expected) <= 4 * error + 0.01, (found / tries, expected)


def test_what_the_keys_do_not_see() -> None:
    same = ["The cat, sat on 12 mats!", "the CAT sat -- on 7\nmats", "THE cat sat on 0 mats"]
    keys = minhash_keys([text.encode() for text in same], 5, 3, 4, 0)
    assert (keys == keys[0]).all(), "case, punctuation, white space and the value of numbers"
    other = minhash_keys([b"the cat sat on mats twelve"], 5, 3, 4, 0)
    assert (other != keys[0]).all(), "an order of words that differs"


def test_word_order_counts_only_inside_ngrams() -> None:
    first, second = (minhash_keys([text], 2, 1, 2, 0)[0] for text in (b"a b c d", b"d c b a"))
    assert first != second
    assert (minhash_keys([b"a b c d"], 1, 1, 2, 0) == minhash_keys([b"d c b a"], 1, 1, 2, 0)).all()


def test_texts_without_words_are_nobodys_duplicates() -> None:
    for keys in (
        minhash_keys([b"", b"--- !!", b"\n", b"x"], 5, 2, 2, 0),
        exact_keys([b"", b" ", b"\n", b"x"]),
    ):
        assert (keys[:3] == 0).all() and (keys[3] != 0).all()
        assert list(first_of_group([keys])) == [0, 1, 2, 3]


def test_groups_are_joined_through_others_and_across_files() -> None:
    """a-b share band 0, b-c share band 1: one group; its first stays."""
    one = np.array([[9, 1], [5, 2], [7, 7]], np.uint64)
    two = np.array([[5, 3], [8, 3], [7, 8]], np.uint64)
    assert list(first_of_group([one, two])) == [0, 1, 2, 1, 1, 2]


def test_grouping_equals_a_plain_search() -> None:
    chance = np.random.default_rng(0)
    for _ in range(20):
        keys = chance.integers(0, 30, (60, 3)).astype(np.uint64)
        first = list(range(60))
        changed = True
        while changed:
            changed = False
            for a in range(60):
                for b in range(60):
                    if ((keys[a] == keys[b]) & (keys[a] != 0)).any() and first[a] != first[b]:
                        first[a] = first[b] = min(first[a], first[b])
                        changed = True
        assert list(first_of_group([keys[:13], keys[13:13], keys[13:]])) == first


def test_exact_duplicates_ignore_white_space_only() -> None:
    keys = exact_keys([b"a b\n\nc", b" a  b c ", b"a b C"])
    assert keys[0] == keys[1] != keys[2]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="all must be 1 to 1024"):
        minhash_keys([b"a"], 5, 0, 8, 0)
