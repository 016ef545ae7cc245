"""How the input is cut into blocks of about 32 MB: what one worker of data/tokenize.py takes at a time.

The cut depends on the inputs alone, so neither memory nor the result depends on their size or on the number of
workers. Blocks are numbered (unit, index). A unit is one file, or a group of small text files. The blocks of
plain JSON lines are known from the file's size; those of a compressed or parquet file only once it is opened,
which only the process that has the unit does.
"""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from megatron_smol.data.inputs import COMPRESSED, TEXT, InputFile, local_file
from megatron_smol.errors import DataError, UserError

BLOCK_BYTES = 32 << 20
_COPY_BYTES = 4 << 20
_UNPACKED_BYTES = 1 << 20  # at a time: each asks pyarrow, which is slow for a few kB

Kind = Literal["lines", "compressed", "text", "parquet"]


@dataclass(frozen=True)
class Block:
    """A piece of the input: lines that begin in [start, stop) of a file, text files, or a row group."""

    unit: int
    index: int
    kind: Kind
    files: tuple[InputFile, ...]
    first_input: int  # number of files[0] among the inputs
    input_bytes: int  # of the files as they are stored, for the progress bar
    start: int = 0  # lines: byte offset; parquet: row group
    stop: int = 0
    data: bytes | None = None  # lines of a compressed file, read already
    spooled: InputFile | None = None  # one line of a compressed file that is too long to hold
    first_line: int = 0  # of `data` or `spooled` in their file, from 0

    @property
    def name(self) -> str:
        return f"block-{self.unit:06d}-{self.index:06d}"


@dataclass(frozen=True)
class Unit:
    number: int
    kind: Kind
    files: tuple[InputFile, ...]
    first_input: int

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        return f"unit-{self.number:06d}"

    @property
    def known_blocks(self) -> int | None:
        """How many blocks it has, when that can be said without opening it."""
        if self.kind == "lines":
            return -(-self.bytes // BLOCK_BYTES)
        return 1 if self.kind == "text" else None

    def block(self, index: int) -> Block:
        """A block by its number; all of it where blocks are known."""
        common = (self.number, index, self.kind, self.files, self.first_input)
        if self.kind != "lines":
            return Block(*common, self.bytes)
        start, stop = index * BLOCK_BYTES, min(self.bytes, (index + 1) * BLOCK_BYTES)
        return Block(*common, stop - start, start, stop)

    def blocks(self, spool: Path, is_done: Callable[[Block], bool] = lambda block: False) -> Iterator[Block]:
        """All blocks. Lines of a compressed file that are too long to hold go to files in the folder `spool`,
        unless their block is done."""
        if self.known_blocks is not None:
            yield from map(self.block, range(self.known_blocks))
        elif self.kind == "parquet":
            groups = open_parquet(self.files[0]).num_row_groups
            for group in range(groups):
                common = (self.number, group, self.kind, self.files, self.first_input)
                yield Block(*common, self.bytes // groups, group)
        else:
            yield from _Decompression(self, spool, is_done).blocks()


def cut_units(files: Sequence[InputFile]) -> list[Unit]:
    """Units in the order of the inputs. Opens nothing."""
    units: list[Unit] = []
    group: list[InputFile] = []

    def close_group(stop: int) -> None:
        if group:
            units.append(Unit(len(units), "text", tuple(group), stop - len(group)))
            group.clear()

    for number, file in enumerate(files):
        kind = _kind(file)
        if kind != "text":
            close_group(number)
            units.append(Unit(len(units), kind, (file,), number))
            continue
        group.append(file)
        if sum(member.size for member in group) >= BLOCK_BYTES or len(group) >= 4096:
            close_group(number + 1)
    close_group(len(files))
    return units


def numbered(units: Iterable[Unit]) -> Iterator[tuple[Unit, int]]:
    """Each unit with the number of its first block, for sharing the work. A unit that must be opened to know its
    blocks counts as one: whoever has it has all of it."""
    first = 0
    for unit in units:
        yield unit, first
        first += unit.known_blocks if unit.known_blocks is not None else 1


def _kind(file: InputFile) -> Kind:
    if file.suffix in TEXT:
        return "text"
    if file.suffix in COMPRESSED:
        return "compressed"
    return "parquet" if file.suffix == ".parquet" else "lines"


class _Decompression:
    """Reads a compressed file once, in blocks of whole lines."""

    def __init__(self, unit: Unit, spool: Path, is_done: Callable[[Block], bool]) -> None:
        self._unit, self._file = unit, unit.files[0]
        self._spool, self._is_done = spool, is_done
        self._index = itertools.count()
        self._line = self._position = 0

    def blocks(self) -> Iterator[Block]:
        with self._file.open() as raw, explained_decompression(self._file):
            stream = decompressed(self._file, raw)
            while data := stream.read(BLOCK_BYTES):
                rest = b"" if data.endswith(b"\n") else stream.readline(BLOCK_BYTES)
                if len(rest) < BLOCK_BYTES or rest.endswith(b"\n"):
                    yield self._next(raw, data=data + rest)
                    continue
                begin = data.rfind(b"\n") + 1
                if begin:
                    yield self._next(raw, data=data[:begin])
                yield self._long_line(raw, stream, data[begin:] + rest)

    def _long_line(self, raw: IO[bytes], stream: io.BufferedIOBase, data: bytes) -> Block:
        block = self._next(raw)
        path = self._spool / f"{block.name}.line"
        keep = not self._is_done(block)
        with path.open("wb") as out:
            while data:
                if keep:
                    out.write(data)
                data = b"" if data.endswith(b"\n") else stream.readline(_COPY_BYTES)
        return Block(**{**vars(block), "spooled": local_file(path)})

    def _next(self, raw: IO[bytes], data: bytes | None = None) -> Block:
        unit, first = self._unit, self._line
        consumed, self._position = raw.tell() - self._position, raw.tell()
        self._line += 1 if data is None else data.count(b"\n")
        common = (unit.number, next(self._index), unit.kind, unit.files, unit.first_input, consumed)
        return Block(*common, data=data, first_line=first)


@contextmanager
def explained_decompression(file: InputFile) -> Iterator[None]:
    """Turn what the libraries say about a damaged file into one sentence."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's or the network's, not the file's: gzip and pyarrow tell damage without a number
        raise DataError(f"{file.name} cannot be decompressed ({error}); copy it again") from error


@contextmanager
def opened(file: str | Path | InputFile) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed by its ending. DataError where the file is damaged, cut off ones included."""
    given = file if isinstance(file, InputFile) else local_file(Path(file))
    with given.open() as raw, explained_decompression(given):
        yield cast(IO[bytes], decompressed(given, raw)) if given.suffix in COMPRESSED else raw


def decompressed(file: InputFile, raw: IO[bytes]) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(raw, "rb")
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"reading {file.name} needs pyarrow: pip install 'megatron-smol[text]'") from None
    # Not zstandard's reader: where a file is cut off, that one ends as if the file were whole.
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _UNPACKED_BYTES)


def open_parquet(file: InputFile) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {file.name} needs pyarrow: pip install 'megatron-smol[text]'") from None
    try:
        # A buffer size makes pyarrow read a column page by page, not whole.
        return pyarrow.parquet.ParquetFile(file.open(), buffer_size=_COPY_BYTES)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file.name} is not a whole parquet file ({error}); copy it again") from error
