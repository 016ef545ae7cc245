"""Blocks of raw input: wherever they are cut, each line is read once, and by its right number."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from megatron_smol.data import corpus
from megatron_smol.errors import DataError

TEXTS = ["", "a", "some more", "x" * 40, "yy", "z" * 7]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_every_cut_reads_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, last: str
) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    data = ("\n".join(lines) + last).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    for size in range(1, len(data) + 2):
        monkeypatch.setattr(corpus, "BLOCK_BYTES", size)
        blocks = list(corpus.iter_blocks([path]))
        assert [block.number for block in blocks] == list(range(len(blocks)))
        documents = [text for block in blocks for (text,) in corpus.read_documents(block, "text")]
        assert documents == TEXTS, size
        for block in blocks:
            try:
                list(corpus.read_documents(block, "missing"))
            except DataError as error:  # of its first line
                number = int(re.search(r"line (\d+)", str(error))[1])
                (first,) = next(corpus.read_documents(block, "text"))
                assert TEXTS[number - 1] == first, size


def test_small_text_files_share_a_block_and_keep_their_order(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (block,) = corpus.iter_blocks(corpus.expand_inputs([tmp_path]))
    assert [text for (text,) in corpus.read_documents(block, "text")] == TEXTS


def test_a_folder_takes_only_what_it_knows(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", "README", "picture.png", "settings.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(file.relative_to(tmp_path)) for file in corpus.expand_inputs([tmp_path])]
    assert found == ["a.txt", "b.jsonl", "sub/c.parquet"]


def test_text_that_is_not_utf8_is_named_or_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (block,) = corpus.iter_blocks([tmp_path / "a.txt"])
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: .* at byte 3"):
        list(corpus.read_documents(block, "text"))
    bad: list[None] = []
    assert list(corpus.read_documents(block, "text", on_bad=lambda: bad.append(None))) == []
    assert len(bad) == 1
