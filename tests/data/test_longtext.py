"""A JSON line read in pieces against the same line parsed as a whole: the same texts, the same refusals."""

from __future__ import annotations

import io
import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data import longtext
from megatron_smol.data.records import parse, texts_of

# What a scanner stumbles over: escapes, quotes, brackets, halves of surrogate pairs, characters of many bytes.
STRINGS = st.lists(
    st.sampled_from([*'a\\"/u{}[]:, 1\t\n', "d83d", "é", "東", "😀", "\ud83d", "\ude00", "\x04"]), max_size=25
).map("".join)
OTHERS = st.recursive(
    st.one_of(st.none(), st.integers(), STRINGS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS | st.just("text"), inner, max_size=3),
    max_leaves=6,
)
WANTED = st.one_of(STRINGS, STRINGS, st.lists(STRINGS, max_size=3), OTHERS)


def in_pieces(line: bytes, read: int, short: int = 1 << 16) -> list[str] | None:
    texts, pieces = [], []
    with patch.multiple(longtext, _READ_BYTES=read, _SHORT_BYTES=short):
        try:
            for piece in longtext._Scan(io.BytesIO(line), "text").pieces():
                if piece is None:
                    texts.append("".join(pieces))
                    pieces = []
                else:
                    pieces.append(piece)
        except ValueError:
            return None
    return texts


def as_a_whole(line: bytes) -> list[str] | None:
    try:
        return texts_of(parse(line), "text")
    except ValueError:
        return None


def same(one: list[str] | None, other: list[str] | None) -> bool:
    """A surrogate pair may come joined or in halves; both are the same text."""
    encoded = [
        None if texts is None else [text.encode("utf-16", "surrogatepass") for text in texts]
        for texts in (one, other)
    ]
    return encoded[0] == encoded[1]


@settings(max_examples=400, deadline=None)
@given(
    before=st.dictionaries(STRINGS, OTHERS, max_size=2),
    wanted=WANTED,
    after=st.dictionaries(STRINGS, OTHERS, max_size=2),
    ascii_only=st.booleans(),
    spaced=st.booleans(),
    read=st.sampled_from([1, 2, 3, 5, 13, 1 << 20]),
    short=st.sampled_from([4, 1 << 16]),
    damage=st.none()
    | st.tuples(st.integers(0, 200), st.sampled_from([b"", b"\\", b'"', b"\xff", b"\n", b"}"])),
    end=st.sampled_from([b"", b"\n", b'\r\n{"text": 3}\n']),
)
def test_a_line_in_pieces_is_the_line_as_a_whole(
    before: dict[str, Any],
    wanted: object,
    after: dict[str, Any],
    ascii_only: bool,
    spaced: bool,
    read: int,
    short: int,
    damage: tuple[int, bytes] | None,
    end: bytes,
) -> None:
    separators = (" , ", " : ") if spaced else (",", ":")
    record = {**before, "text": wanted, **after}
    line = json.dumps(record, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "surrogatepass")
    if damage:
        place, what = damage
        line = line[:place] + what + line[place + 1 :]
    first = line.split(b"\n")[0]
    assert same(in_pieces(line + end, read, short), as_a_whole(first)), line


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "abc', "a string does not end"),
        (b'{"text": "abc\n"}', "a string does not end"),
        (b'{"text": "a\\u12z4 and some more"}', "invalid escape"),
        (b'{"text": "a\\x and some more text"}', "not one JSON object"),
        (b'{"text": "a"} "b"', "not one JSON object"),
        (b'{"body": "a"}', "no key 'text'; found: body"),
        (b'{"text": {"text": "a"}}', "key 'text' holds a dict"),
        (b'{"text": "a", "text": "b"}', "occurs more than once"),
        (b'["text", "a"]', "found a list"),
        (b'{"text": "caf\xe9 and more"}', "not UTF-8"),
    ],
)
def test_a_bad_line_says_why(line: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        list(longtext._Scan(io.BytesIO(line), "text").pieces())


def test_what_is_kept_of_a_line_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longtext, "_REST_BYTES", 1000)
    numbers = json.dumps({"text": "x" * 5000, "url": "y" * 500, "embedding": [1] * 200}).encode()
    assert in_pieces(numbers, 64, short=100) == ["x" * 5000]
    numbers = json.dumps({"text": "x", "embedding": [1] * 600}).encode()
    with pytest.raises(ValueError, match="besides its long strings"):
        list(longtext._Scan(io.BytesIO(numbers), "text").pieces())
