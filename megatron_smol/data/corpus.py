"""Raw text files to documents: the input side of data/tokenize.py.

Inputs are JSON lines (plain, .gz, .zst), text (.txt, one document a file) or parquet. They are cut into
blocks of about 32 MB in an order that depends on the inputs alone; a block is what one worker tokenizes at a
time, so memory does not grow with the input and the result does not depend on the number of workers.
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from megatron_smol.errors import DataError, UserError

BLOCK_BYTES = 32 << 20
_TEXT = (".txt", ".text", ".md", ".rst")
_IN_FOLDERS = (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".txt")

# The strings of one document: one, or several when the input is split into sentences already.
Document = list[str]


@dataclass(frozen=True)
class Block:
    """A piece of the input that one worker reads: bytes of a file, whole small text files, or a row group."""

    number: int
    kind: Literal["lines", "text", "parquet"]
    files: tuple[Path, ...]
    start: int = 0  # lines: byte offset; parquet: row group
    stop: int = 0
    data: bytes | None = None  # lines of a compressed file, read already
    first_line: int = 1  # of `data`
    input_bytes: int = 0  # of the files as they lie on the disk, for the progress bar


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, globs and folders to files, sorted within each argument; the order is that of the tokens."""
    files: list[Path] = []
    for given in map(str, inputs):
        path = Path(given)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(_IN_FOLDERS))
        elif path.is_file():
            found = [path]
        else:
            found = [Path(file) for file in sorted(glob.glob(given, recursive=True)) if Path(file).is_file()]  # noqa: PTH207 (Path.glob refuses absolute patterns)
        if not found:
            raise UserError(
                f"no input at {given}: give files, folders or globs of .jsonl, .txt or .parquet (.jsonl.gz "
                f"and .jsonl.zst too)"
            )
        files += found
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise UserError(f"{twice} is named twice among the inputs; its documents would count twice")
    return files


def iter_blocks(files: Sequence[Path]) -> Iterator[Block]:
    """All blocks of the inputs, numbered. Reads nothing but sizes, except for compressed files."""
    number = itertools.count()
    for kind, group in itertools.groupby(files, key=_kind):
        cut = {"text": _text_blocks, "parquet": _parquet_blocks, "lines": _line_blocks}[kind]
        yield from cut(group, number)


def _kind(file: Path) -> Literal["lines", "text", "parquet"]:
    if file.suffix in _TEXT:
        return "text"
    return "parquet" if file.suffix == ".parquet" else "lines"


def _text_blocks(files: Iterable[Path], number: Iterator[int]) -> Iterator[Block]:
    group: list[Path] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.stat().st_size
        if size >= BLOCK_BYTES:
            yield Block(next(number), "text", tuple(group), input_bytes=size)
            group, size = [], 0
    if group:
        yield Block(next(number), "text", tuple(group), input_bytes=size)


def _line_blocks(files: Iterable[Path], number: Iterator[int]) -> Iterator[Block]:
    for file in files:
        if file.suffix in (".gz", ".zst"):
            yield from _compressed_blocks(file, number)
            continue
        size = file.stat().st_size
        for start in range(0, size, BLOCK_BYTES):
            stop = min(size, start + BLOCK_BYTES)
            yield Block(next(number), "lines", (file,), start, stop, input_bytes=stop - start)


def _compressed_blocks(file: Path, number: Iterator[int]) -> Iterator[Block]:
    line, position = 1, 0
    with file.open("rb") as raw:
        stream = _decompressed(file, raw)
        while True:
            try:
                data = stream.read(BLOCK_BYTES)
                if data and not data.endswith(b"\n"):
                    data += stream.readline()
            except (EOFError, OSError, zlib.error) as error:
                raise DataError(f"{file} cannot be decompressed ({error}); copy it again") from error
            if not data:
                return
            consumed, position = raw.tell() - position, raw.tell()
            yield Block(next(number), "lines", (file,), data=data, first_line=line, input_bytes=consumed)
            line += data.count(b"\n")


def _decompressed(file: Path, raw: IO[bytes]) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(raw, "rb")
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {file} needs zstandard: pip install zstandard") from None
    stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return io.BufferedReader(stream)


def _parquet_blocks(files: Iterable[Path], number: Iterator[int]) -> Iterator[Block]:
    for file in files:
        groups = _open_parquet(file).num_row_groups
        for group in range(groups):
            yield Block(
                next(number), "parquet", (file,), start=group, input_bytes=file.stat().st_size // groups
            )


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {file} needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file} is not a whole parquet file ({error}); copy it again") from error


def read_documents(
    block: Block, json_key: str, on_bad: Callable[[], None] | None = None
) -> Iterator[Document]:
    """Documents of a block. A bad line is an error, or a call of `on_bad`."""
    if block.kind == "parquet":
        yield from _parquet_documents(block, json_key)
    elif block.kind == "text":
        for file in block.files:
            try:
                yield [file.read_bytes().decode("utf-8-sig")]
            except UnicodeDecodeError as error:
                _refuse(f"{file} is not UTF-8 text: {error.reason} at byte {error.start:,}", on_bad)
    else:
        for index, line in enumerate(io.BytesIO(_lines(block))):
            if line.isspace():
                continue
            try:
                yield _texts(_parse(line.rstrip(b"\r\n")), json_key)
            except ValueError as error:
                _refuse(f"{block.files[0]} line {_line_number(block, index):,}: {error}", on_bad)


def _refuse(message: str, on_bad: Callable[[], None] | None) -> None:
    if on_bad is None:
        raise DataError(f"{message}; mend it, or use --skip-bad to skip and count such lines")
    on_bad()


def _lines(block: Block) -> bytes:
    """Whole lines of the block: those that begin inside [start, stop)."""
    if block.data is not None:
        return block.data
    with block.files[0].open("rb") as stream:
        if block.start:
            stream.seek(block.start - 1)
            stream.readline()
        elif stream.read(3) != b"\xef\xbb\xbf":  # a byte order mark is no JSON
            stream.seek(0)
        data = stream.read(max(0, block.stop - stream.tell()))
        return data if data.endswith(b"\n") or not data else data + stream.readline()


def _line_number(block: Block, index: int) -> int:
    if block.data is not None:
        return block.first_line + index
    with block.files[0].open("rb") as stream:
        before = sum(stream.read(1 << 20).count(b"\n") for _ in range(block.start >> 20))
        before += stream.read(block.start - stream.tell()).count(b"\n")
        # A block that begins inside a line begins reading after it.
        begins_inside = block.start > 0 and not _ends_line(stream, block.start)
    return before + begins_inside + index + 1


def _ends_line(stream: IO[bytes], position: int) -> bool:
    stream.seek(position - 1)
    return stream.read(1) == b"\n"


def _parse(line: bytes) -> Any:
    with suppress(ValueError):  # stricter than json, e.g. about lone surrogates: then json decides
        return orjson.loads(line)
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object ({error.msg} at character {error.pos + 1:,})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start + 1:,})") from None


def _texts(record: Any, json_key: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"expected one JSON object a line, found a {type(record).__name__}")
    if json_key not in record:
        raise ValueError(f"no key '{json_key}'; found: {', '.join(list(record)[:12]) or 'none'}")
    return _strings(record[json_key], f"key '{json_key}'")


def _strings(value: Any, where: str) -> Document:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    raise ValueError(f"{where} holds a {type(value).__name__}; expected text, or a list of texts")


def _parquet_documents(block: Block, column: str) -> Iterator[Document]:
    file = _open_parquet(block.files[0])
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(
            f"{block.files[0]}: no column '{column}'; found: {', '.join(names)}; choose with --json-key"
        )
    for batch in file.iter_batches(batch_size=1024, row_groups=[block.start], columns=[column]):
        try:
            yield from (_strings(value, f"column '{column}'") for value in batch.column(0).to_pylist())
        except ValueError as error:
            raise DataError(f"{block.files[0]}: {error}") from None
