"""One token space over many shards, and what it says when a shard is not what it was."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data import stores
from megatron_smol.data.indexed import IndexedReader, IndexedWriter
from megatron_smol.data.manifest import Manifest, ShardRecord, TokenizerRecord
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.data.stores import LocalStore, OpenFiles
from megatron_smol.errors import DataError


@dataclass
class Identity:
    name: str
    sha256: str
    vocab_size: int


def write_source(folder: Path, shards: list[list[list[int]]], vocab_size: int = 50_000) -> np.ndarray:
    records = []
    for number, documents in enumerate(shards):
        with IndexedWriter(folder / f"shard-{number:05d}", np.uint16) as writer:
            for document in documents:
                writer.add_document(document)
            summary = writer.finalize()
        records.append(ShardRecord(prefix=f"shard-{number:05d}", **vars(summary)))
    Manifest(
        source="prose",
        tokenizer=TokenizerRecord(
            name="smol", sha256=hashlib.sha256(b"smol").hexdigest(), vocab_size=vocab_size, eod_id=3
        ),
        dtype="uint16",
        tokens=sum(record.tokens for record in records),
        documents=sum(record.documents for record in records),
        append_eod=True,
        json_key="text",
        sentences=None,
        keep_newlines=False,
        seed=0,
        empty_documents=0,
        bad_lines=0,
        dropped_characters=0,
        shards=tuple(records),
        inputs=(),
        versions={},
    ).write(folder / "manifest.json")
    return np.array([token for documents in shards for document in documents for token in document])


# Every document ends with the manifest's end-of-document id, 3.
SHARDS = [[[1, 2, 3], [4, 3]], [[3]], [[7, 8, 9, 3]]]
TOKENS = [1, 2, 3, 4, 3, 3, 7, 8, 9, 3]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_any_span_is_what_lies_there(
    data: st.DataObject, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("source")
    numbers = iter(range(1000))
    everything = write_source(folder, [[[next(numbers) for _ in range(size)]] for size in sizes])
    source = load_source(folder)
    assert source.tokens == len(everything)
    start = data.draw(st.integers(0, source.tokens))
    count = data.draw(st.integers(0, source.tokens - start))
    assert source.read(start, count).tolist() == everything[start : start + count].tolist()
    assert source.read(start, count).dtype == np.uint16


def test_windows_of_many_shards_are_read_at_once(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    source = load_source(tmp_path)
    rows = np.zeros((3, 4), np.uint16)
    source.read_windows([6, 0, 3], list(rows))
    assert rows.tolist() == [TOKENS[6:], TOKENS[:4], TOKENS[3:7]]
    with pytest.raises(IndexError, match="has 10"):
        source.read_windows([0, 7], list(rows[:2]))


def test_shards_are_opened_when_asked_for(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    source = load_source(tmp_path)
    assert len(source.shards) == 3 and source.shards[-1].document(0).tolist() == [7, 8, 9, 3]
    assert [shard.tokens for shard in source.shards[:2]] == [5, 1]
    with pytest.raises(IndexError):
        source.shards[3]


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (9, 2), (11, 0), (0, -1)])
def test_spans_outside_are_refused(tmp_path: Path, start: int, count: int) -> None:
    write_source(tmp_path, SHARDS)
    with pytest.raises(IndexError, match="'prose'"):
        load_source(tmp_path).read(start, count)


def test_facts_of_a_source(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    source = load_source(tmp_path)
    assert (source.name, source.tokens, source.documents, source.eod_id) == ("prose", 10, 4, 3)
    source.deep_check()


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_missing_shard_is_named(tmp_path: Path, end: str) -> None:
    write_source(tmp_path, SHARDS)
    (tmp_path / f"shard-00001{end}").unlink()
    with pytest.raises(DataError, match=rf"missing shard file .*shard-00001\{end}"):
        load_source(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    (tmp_path / "shard-00002.bin").write_bytes(b"\0\0\0\0\0\0")
    with pytest.raises(DataError, match=r"shard-00002\.bin has 6 bytes, expected 8"):
        load_source(tmp_path)


def test_a_whole_pair_of_another_source_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    with IndexedWriter(tmp_path / "shard-00001", np.uint16) as writer:
        writer.add_document([1, 2])
        writer.finalize()
    with pytest.raises(DataError, match=r"shard-00001\.bin has 4 bytes, expected 2"):
        load_source(tmp_path)


def test_a_pair_of_the_same_size_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    with IndexedWriter(tmp_path / "shard-00001", np.int8) as writer:
        writer.add_document([1, 2])
        writer.finalize()
    with pytest.raises(DataError, match=r"shard-00001\.idx is not the one .* found 2 tokens .* of int8"):
        load_source(tmp_path).shards[1]


def test_a_shard_that_vanishes_later_is_named_when_it_is_needed(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    source = load_source(tmp_path)
    (tmp_path / "shard-00002.bin").unlink()
    assert source.read(0, 6).tolist() == TOKENS[:6]
    with pytest.raises(DataError, match=r"missing shard file .*shard-00002\.bin"):
        source.read(4, 4)


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    source = load_source(tmp_path)
    source.check_tokenizer(Identity("renamed copy", hashlib.sha256(b"smol").hexdigest(), 50_000))
    with pytest.raises(
        DataError, match=r"'prose' was made with another tokenizer: .*smol .*50,000.*llama .*32,000"
    ):
        source.check_tokenizer(Identity("llama", "0" * 64, 32_000))


def test_a_changed_byte_is_found_by_the_deep_check(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    path = tmp_path / "shard-00002.bin"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    source = load_source(tmp_path)
    with pytest.raises(DataError, match=r"shard-00002\.bin changed since it was written"):
        source.deep_check()


def test_ids_beyond_the_vocabulary_are_found_by_the_deep_check(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS, vocab_size=9)
    with pytest.raises(DataError, match="holds id 9; the vocabulary ends at 9"):
        load_source(tmp_path).deep_check()


def test_a_bare_megatron_prefix(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "web_text_document", np.int32) as writer:
        writer.add_document([1, 70_000, 3])
        writer.finalize()
    for name in ("web", "web_text_document", "web_text_document.idx"):
        source = load_source(tmp_path / name)
        assert (source.tokens, source.eod_id, source.dtype) == (3, None, np.int32)
        source.check_tokenizer(Identity("anything", "0", 1))
        assert source.read(1, 2).tolist() == [70_000, 3]


def test_shards_of_two_types_are_refused(tmp_path: Path) -> None:
    for name, dtype in (("a", np.uint16), ("b", np.int32)):
        with IndexedWriter(tmp_path / name, dtype) as writer:
            writer.add_document([1])
            writer.finalize()
    with pytest.raises(DataError, match="differ in type"):
        TokenSource(
            "mixed",
            LocalStore(tmp_path),
            None,
            [IndexedReader(tmp_path / "a"), IndexedReader(tmp_path / "b")],
        )


def open_descriptors() -> int:
    gc.collect()  # what an earlier test left open must not go between two counts
    return len(list(Path("/proc/self/fd").iterdir()))


def test_thousands_of_shards_open_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening looks at sizes only; reading keeps a bounded number of descriptors and no memory map."""
    everything = write_source(tmp_path, [[[number % 50, 3]] for number in range(300)])
    files = OpenFiles(8)
    monkeypatch.setattr(stores, "OPEN_FILES", files)
    before = open_descriptors()
    source = load_source(tmp_path)
    assert open_descriptors() == before and len(files) == 0
    rows = np.zeros((300, 3), np.uint16)
    starts = np.random.default_rng(0).integers(0, source.tokens - 3, 300).tolist()
    source.read_windows(starts, list(rows))
    assert [row.tolist() for row in rows] == [everything[start : start + 3].tolist() for start in starts]
    assert len(files) == 8 and open_descriptors() == before + 8
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


TRUNCATED_WHILE_READ = """
import sys
from pathlib import Path
from megatron_smol.data.source import load_source
source = load_source(sys.argv[1])
source.read(0, 200_000)
print("opened", flush=True)
sys.stdin.readline()
try:
    source.read(150_000, 1000)
except ValueError as error:
    print(error)
"""


def test_a_shard_truncated_while_it_is_read_names_itself(tmp_path: Path) -> None:
    """A memory map would end the process with SIGBUS here."""
    write_source(tmp_path, [[[*range(1000)] * 200 + [3]]])
    command = [sys.executable, "-c", TRUNCATED_WHILE_READ, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "opened\n"
    os.truncate(tmp_path / "shard-00000.bin", 4096)
    said, _ = process.communicate("go\n", timeout=60)
    assert process.returncode == 0, process.returncode
    assert f"{tmp_path}/shard-00000.bin has 4,096 bytes, expected 400,002: it is truncated" in said
