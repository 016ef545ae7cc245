"""Blocks of raw input: wherever they are cut, each line is read once, and by its right number."""

from __future__ import annotations

import errno
import gzip
import json
import re
from pathlib import Path

import pytest

from megatron_smol.data import corpus, longtext
from megatron_smol.data.corpus import Block, cut_units, opened
from megatron_smol.data.inputs import expand_inputs
from megatron_smol.data.longtext import LongText
from megatron_smol.data.reading import LongRow, Reading, Row
from megatron_smol.errors import DataError

TEXTS = ["", "a", "some more", "x" * 40, "yy", "z" * 7]


def blocks_of(path: Path) -> list[Block]:
    units = cut_units(expand_inputs([path]))
    return [block for unit in units for block in unit.blocks(path.parent)]


def texts_of(block: Block) -> list[str]:
    """Its documents, also those that come in pieces."""
    texts = []
    for row in Reading(block, "text").documents():
        if isinstance(row, Row):
            (text,) = row.document
        else:
            pieces = list(row.document.pieces())
            assert pieces.pop() is None and None not in pieces
            text = "".join(pieces)  # type: ignore[arg-type]
        texts.append(text)
    return texts


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_every_cut_reads_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, last: str
) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    data = ("\n".join(lines) + last).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    long = 0
    for size in range(1, len(data) + 2):
        monkeypatch.setattr(corpus, "BLOCK_BYTES", size)
        blocks = blocks_of(path)
        assert [block.index for block in blocks] == list(range(len(blocks)))
        assert [text for block in blocks for text in texts_of(block)] == TEXTS, size
        rows = 0
        for block in blocks:
            reading = Reading(block, "missing")
            try:
                for row in reading.documents():
                    assert isinstance(row, LongRow)
                    long += 1
                    reading.refuse("no key")
            except DataError as error:  # of its first line
                assert int(re.search(r"line (\d+)", str(error))[1]) == rows + 1, size
            reading = Reading(block, "text")
            list(reading.documents())
            rows += reading.rows
        assert rows == len(TEXTS)
    assert long > 50, "lines longer than a block come in pieces"


def test_small_text_files_share_a_block_and_keep_their_order(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (block,) = blocks_of(tmp_path)
    assert texts_of(block) == TEXTS
    assert [row.input for row in Reading(block, "text").documents()] == list(range(len(TEXTS)))


def test_a_large_text_file_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 50)
    text = "größe 東京 😀\r\n" * 9
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in range(1, 9):
        monkeypatch.setattr(longtext, "_READ_BYTES", size)
        (block,) = blocks_of(tmp_path / "a.txt")
        (row,) = Reading(block, "text").documents()
        assert isinstance(row, LongRow) and texts_of(block) == [text]
    (tmp_path / "a.txt").write_bytes(text.encode()[:70] + b"\xff" + b"x" * 70)
    with pytest.raises(ValueError, match="at byte 70"):
        list(LongText(expand_inputs([tmp_path / "a.txt"])[0]).pieces())


def test_a_folder_takes_only_what_it_knows(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", "README", "picture.png", "settings.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(Path(file.name).relative_to(tmp_path)) for file in expand_inputs([tmp_path])]
    assert found == ["a.txt", "b.jsonl", "sub/c.parquet"]


def test_text_that_is_not_utf8_is_named_or_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (block,) = blocks_of(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text: .* at byte 3"):
        list(Reading(block, "text").documents())
    reading = Reading(block, "text", skip_bad=True)
    assert list(reading.documents()) == [] and reading.bad == 1


def damaged_files(folder: Path) -> list[Path]:
    """Compressed lines: cut off, and with bytes in their middle that are others."""
    zstandard = pytest.importorskip("zstandard")
    lines = b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(9000))
    paths = []
    for ending, whole in ((".gz", gzip.compress(lines)), (".zst", zstandard.compress(lines))):
        middle = len(whole) // 2
        for name, content in (
            ("cut", whole[:-9]),
            ("other", whole[:middle] + b"\xff" * 64 + whole[middle + 64 :]),
        ):
            paths.append(folder / f"{name}.jsonl{ending}")
            paths[-1].write_bytes(content)
    return paths


def test_a_damaged_file_is_told_by_its_name_and_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    for path in damaged_files(tmp_path):
        says = rf"{re.escape(path.name)} cannot be decompressed \(.+\); copy it again"
        with pytest.raises(DataError, match=says), opened(path) as stream:
            stream.read()
        with pytest.raises(DataError, match=says):
            blocks_of(path)


def test_what_the_disk_says_is_not_told_as_damage(tmp_path: Path) -> None:
    """A job waits for a disk that is away; a damaged file ends it."""
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(OSError, match="away") as told, opened(path):
        raise OSError(errno.EIO, "away")
    assert not isinstance(told.value, DataError)
