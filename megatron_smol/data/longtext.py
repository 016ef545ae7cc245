"""Documents that are too long to hold, read in pieces: a JSON line or a text file of any size.

data/reading.py finds them, data/encode.py tokenizes the pieces. A JSON line is checked as strictly as a short
one: every string is unescaped by the JSON parser, piece by piece, and what remains of the line without its long
strings is parsed as a whole at the end.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from megatron_smol.data.inputs import InputFile
from megatron_smol.data.records import parse, texts_of

_READ_BYTES = 1 << 20
_SHORT_BYTES = 64 << 10  # strings of other keys up to this are kept, to check the line as a whole
_REST_BYTES = 64 << 20  # of a line, without its long strings
_WHITE = b" \t\r"
# Whole units of a JSON string only: never half an escape, never half of a surrogate pair.
_UNITS = re.compile(
    rb'(?:[^"\\\n]++|\\[^u\n]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}(?=[^\\]|\\[^u]|\\u[0-9a-fA-F]{4}))*+"
)
_LONGEST_UNIT = 12
_OUTSIDE = re.compile(rb'[^"\n]*+')


@dataclass(frozen=True)
class LongText:
    """A text file: one sequence."""

    file: InputFile

    def pieces(self) -> Iterator[str | None]:
        """Strings to be joined; None ends a sequence. Raises ValueError when the text is bad."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        done = 0
        with self.file.open() as stream:
            while True:
                data = stream.read(_READ_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    yield decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    at = done - pending + error.start
                    raise ValueError(f"not UTF-8 text: {error.reason} at byte {at:,}") from None
                done += len(data)
                if not data:
                    break
        yield None


@dataclass(frozen=True)
class LongLine:
    """A JSON line that begins at a byte of a file."""

    file: InputFile
    start: int
    json_key: str

    def pieces(self) -> Iterator[str | None]:
        """As LongText.pieces. Errors may come after all the text: then the text counts for nothing."""
        with self.file.open() as stream:
            stream.seek(self.start)
            yield from _Scan(stream, self.json_key).pieces()


LongDocument = LongText | LongLine


class _Scan:
    """Walks along the line: outside a string, inside one, outside, ..."""

    def __init__(self, stream: IO[bytes], json_key: str) -> None:
        self._stream, self._key = stream, json_key
        self._buffer, self._at = b"", 0
        self._rest = bytearray()  # the line without its long strings
        self._streamed = 0
        # Where we are: nesting, the last string at depth 1 (a name), and whether in the key's list of texts.
        self._depth, self._name, self._in_list = 0, "", False

    def pieces(self) -> Iterator[str | None]:
        while (outside := self._outside()) is not None:
            self._depth += sum(outside.count(sign) for sign in (b"{", b"["))
            self._depth -= sum(outside.count(sign) for sign in (b"}", b"]"))
            between = outside.translate(None, _WHITE)
            follows_key = self._name == self._key
            self._in_list = (between == b":[" and follows_key) or (self._in_list and between == b",")
            if self._in_list or (between == b":" and follows_key):
                yield from self._wanted()
            else:
                self._other()
        texts = texts_of(parse(bytes(self._rest)), self._key)
        if len(texts) != self._streamed:
            raise ValueError(f"key '{self._key}' occurs more than once")

    def _wanted(self) -> Iterator[str | None]:
        for raw in self._string():
            yield _unescaped(raw)
        yield None
        self._streamed += 1
        self._name = ""
        self._keep(b'""')

    def _other(self) -> None:
        kept = bytearray()
        for raw in self._string():
            _unescaped(raw)
            if len(kept) <= _SHORT_BYTES:
                kept += raw
        short = len(kept) <= _SHORT_BYTES
        self._name = str(_unescaped(bytes(kept))) if self._depth == 1 and short else ""
        self._keep(b'"' + kept + b'"' if short else b'""')

    def _outside(self) -> bytes | None:
        """Bytes up to the next string, or None at the end of the line."""
        begin = len(self._rest)
        while True:
            found = _OUTSIDE.match(self._buffer, self._at)
            assert found is not None
            self._keep(found.group())
            self._at = found.end()
            if self._at < len(self._buffer):
                break
            if not self._refill():
                return None
        if self._buffer[self._at] == 0x0A:
            return None
        self._at += 1  # the quote
        return bytes(self._rest[begin:])

    def _string(self) -> Iterator[bytes]:
        """The raw bytes of a string in pieces that can be unescaped one by one; leaves behind its quote."""
        while True:
            found = _UNITS.match(self._buffer, self._at)
            assert found is not None
            end = found.end()
            if end < len(self._buffer) and self._buffer[end] == 0x22:
                yield self._buffer[self._at : end]
                self._at = end + 1
                return
            if end < len(self._buffer) - _LONGEST_UNIT:
                wrong = self._buffer[end : end + 6]
                raise ValueError(
                    "not one JSON object (a string does not end)"
                    if wrong.startswith(b"\n")
                    else f"not one JSON object (invalid escape {wrong!r})"
                )
            end = _character_start(self._buffer, self._at, end)
            if end > self._at:
                yield self._buffer[self._at : end]
                self._at = end
            if not self._refill():
                raise ValueError("not one JSON object (a string does not end)")

    def _refill(self) -> bool:
        data = self._stream.read(_READ_BYTES)
        self._buffer, self._at = self._buffer[self._at :] + data, 0
        return bool(data)

    def _keep(self, data: bytes | bytearray) -> None:
        self._rest += data
        if len(self._rest) > _REST_BYTES:
            raise ValueError(f"the line holds more than {_REST_BYTES >> 20} MB besides its long strings")


def _character_start(data: bytes, start: int, end: int) -> int:
    """`end`, or the start of the UTF-8 character that may go on behind it."""
    if end == start or data[end - 1] < 0x80:
        return end
    place = end - 1
    while place > start and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _unescaped(raw: bytes) -> str:
    text = parse(b'"' + raw + b'"')
    assert isinstance(text, str)
    return text
