"""One token space over many shards, and what it says when a shard is not what it was."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data.indexed import IndexedReader, IndexedWriter
from megatron_smol.data.manifest import Manifest, ShardRecord, TokenizerRecord
from megatron_smol.data.source import TokenSource, load_source
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


SHARDS = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10]]]


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


def test_a_span_in_one_shard_is_not_copied(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    source = load_source(tmp_path)
    assert np.shares_memory(source.read(1, 3), source.shards[0].ids)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (9, 2), (11, 0), (0, -1)])
def test_spans_outside_are_refused(tmp_path: Path, start: int, count: int) -> None:
    write_source(tmp_path, SHARDS)
    with pytest.raises(IndexError, match="'prose', which has 10"):
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
    with pytest.raises(DataError, match=r"shard-00002\.bin has 6 bytes but .* describes 8"):
        load_source(tmp_path)


def test_a_whole_pair_of_another_source_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    with IndexedWriter(tmp_path / "shard-00001", np.uint16) as writer:
        writer.add_document([1, 2])
        writer.finalize()
    with pytest.raises(
        DataError, match=r"shard-00001\.idx is not the one its manifest describes: found 2 tokens"
    ):
        load_source(tmp_path)


def test_a_shard_that_vanishes_later_is_named_when_it_is_needed(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    source = load_source(tmp_path)
    (tmp_path / "shard-00002.bin").unlink()
    assert source.read(0, 6).tolist() == [1, 2, 3, 4, 5, 6]
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
    write_source(tmp_path, SHARDS, vocab_size=10)
    with pytest.raises(DataError, match="holds id 10; the vocabulary ends at 10"):
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
        TokenSource("mixed", [IndexedReader(tmp_path / "a"), IndexedReader(tmp_path / "b")], None)
