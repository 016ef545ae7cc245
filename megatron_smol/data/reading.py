"""The documents of a block of input: between data/corpus.py, which cuts, and data/encode.py, which tokenizes.

JSON lines, text files (one document each) and parquet rows. What is too long to hold is a LongDocument
(data/longtext.py), read in pieces.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from megatron_smol.data import corpus
from megatron_smol.data.corpus import Block, Unit, decompressed, explained_decompression, open_parquet
from megatron_smol.data.longtext import LongDocument, LongLine, LongText
from megatron_smol.data.records import Document, parse, strings_of, texts_of
from megatron_smol.errors import DataError

_BATCH_BYTES, _BATCH_ROWS = 8 << 20, 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A document and where it stood."""

    document: Document
    row: int  # line of its block, or row of its row group, from 0; of a text file always 0
    input: int  # number among the inputs


class LongRow(NamedTuple):
    """The same of a document that is not to be held."""

    document: LongDocument
    row: int
    input: int


class Reading:
    """Reads one block. `rows` counts lines and rows so far, `bad` those that were skipped."""

    def __init__(self, block: Block, json_key: str, skip_bad: bool = False) -> None:
        self._block, self._key, self._skip_bad = block, json_key, skip_bad
        self.rows = self.bad = 0

    def documents(self) -> Iterator[Row | LongRow]:
        kinds = {"parquet": self._of_parquet, "text": self._of_text}
        return kinds.get(self._block.kind, self._of_lines)()

    def refuse(self, why: object) -> None:
        """The document read last is bad: an error with its place, or counted with `skip_bad`."""
        if not self._skip_bad:
            raise DataError(f"{self._place()}: {why}; mend it, or use --skip-bad to skip and count such rows")
        self.bad += 1

    def _place(self) -> str:
        block, last = self._block, self.rows - 1
        if block.kind == "text":
            return block.files[last].name
        if block.kind == "parquet":
            return f"{block.files[0].name} row group {block.start + 1:,} row {self.rows:,}"
        return f"{block.files[0].name} line {_line_number(block, last):,}"

    def _of_lines(self) -> Iterator[Row | LongRow]:
        block, key, first = self._block, self._key, self._block.first_input
        for index, line in enumerate(_lines(block, key)):
            self.rows = index + 1
            if isinstance(line, LongLine):
                yield LongRow(line, index, first)
            elif not line.isspace():
                try:
                    yield Row(texts_of(parse(line.rstrip(b"\r\n")), key), index, first)
                except ValueError as error:
                    self.refuse(error)

    def _of_text(self) -> Iterator[Row | LongRow]:
        for index, file in enumerate(self._block.files):
            self.rows = index + 1
            number = self._block.first_input + index
            if file.size > corpus.BLOCK_BYTES:
                yield LongRow(LongText(file), 0, number)
                continue
            try:
                with file.open() as stream:
                    yield Row([stream.read().decode("utf-8-sig")], 0, number)
            except UnicodeDecodeError as error:
                self.refuse(f"not UTF-8 text: {error.reason} at byte {error.start:,}")

    def _of_parquet(self) -> Iterator[Row]:
        block, column = self._block, self._key
        name = block.files[0].name
        parquet = open_parquet(block.files[0])
        names = parquet.schema_arrow.names
        if column not in names:
            raise DataError(
                f"{name}: no column '{column}'; found: {', '.join(names)}; choose with --json-key"
            )
        about = parquet.metadata.row_group(block.start)
        rows = _BATCH_BYTES * max(1, about.num_rows) // max(1, about.total_byte_size)
        batches = parquet.iter_batches(
            batch_size=min(_BATCH_ROWS, max(1, rows)), row_groups=[block.start], columns=[column]
        )
        for batch in batches:
            for value in batch.column(0).to_pylist():
                self.rows += 1
                try:
                    yield Row(strings_of(value, f"column '{column}'"), self.rows - 1, block.first_input)
                except ValueError as error:
                    self.refuse(error)


def head_of(unit: Unit, json_key: str, size: int) -> Iterator[Document]:
    """Some of the first documents of a unit, from about `size` bytes of its first file; bad ones are left out."""
    file = unit.files[0]
    if unit.kind == "parquet":
        if open_parquet(file).num_row_groups:
            rows = Reading(unit.block(0), json_key, skip_bad=True).documents()
            yield from (row.document for row in rows if isinstance(row, Row))
        return
    with file.open() as raw, explained_decompression(file):
        stream = decompressed(file, raw) if unit.kind == "compressed" else raw
        data = stream.read(size)
    if unit.kind == "text":
        yield [data.decode("utf-8-sig", errors="ignore")]
        return
    for line in io.BytesIO(data.removeprefix(_BYTE_ORDER_MARK)):
        with suppress(ValueError):
            yield texts_of(parse(line), json_key)


def _lines(block: Block, json_key: str) -> Iterator[bytes | LongLine]:
    """Lines of the block: those that begin inside [start, stop)."""
    if block.data is not None:
        yield from io.BytesIO(block.data)
        return
    if block.spooled is not None:
        yield LongLine(block.spooled, 0, json_key)
        return
    file = block.files[0]
    with file.open() as stream:
        begin, data = _from_first_line(stream, block)
        if not data:
            return
        rest = b"" if data.endswith(b"\n") else stream.readline(corpus.BLOCK_BYTES)
        if len(rest) < corpus.BLOCK_BYTES or rest.endswith(b"\n"):
            yield from io.BytesIO(data + rest if rest else data)
            return
    cut = data.rfind(b"\n") + 1
    yield from io.BytesIO(data[:cut])
    yield LongLine(file, begin + cut, json_key)


def _from_first_line(stream: io.BufferedReader, block: Block) -> tuple[int, bytes]:
    """Offset of the first line that begins in the block, and the block's bytes from there."""
    if block.start == 0:
        data = stream.read(block.stop)
        begin = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0
        return begin, data[begin:] if begin else data
    stream.seek(block.start - 1)
    data = stream.read(block.stop - block.start + 1)
    begin = data.find(b"\n") + 1
    return block.start - 1 + begin, data[begin:] if begin else b""


def _line_number(block: Block, index: int) -> int:
    """From 1, in the whole file; reads the file up to the block."""
    before = block.first_line
    if block.data is None and block.spooled is None and block.start:
        with block.files[0].open() as stream:
            before = _newlines(stream, block.start)
            stream.seek(block.start - 1)
            # A block that begins inside a line begins reading after it.
            before += stream.read(1) != b"\n"
    return before + index + 1


def _newlines(stream: io.BufferedReader, stop: int) -> int:
    count = 0
    while stop > 0 and (data := stream.read(min(stop, 1 << 20))):
        count += data.count(b"\n")
        stop -= len(data)
    return count
