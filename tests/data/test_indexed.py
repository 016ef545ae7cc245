"""The .bin/.idx writer and reader against megatron-core's own, and against damage."""

from __future__ import annotations

import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_smol.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megatron_smol.errors import DataError

# A document is the ids of its sentences.
SENTENCE = st.lists(st.integers(0, 60_000), min_size=1, max_size=9)
DOCUMENTS = st.lists(st.lists(SENTENCE, min_size=1, max_size=4), min_size=1, max_size=12)


def flat(lists: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def write(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for sentences in documents:
            writer.add_document(flat(sentences), [len(sentence) for sentence in sentences])
        writer.finalize()


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, dtype=st.sampled_from([np.uint16, np.int32]))
def test_bytes_are_those_of_megatron_core(documents: list[list[list[int]]], dtype: type) -> None:
    with TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        write(ours, documents, dtype)
        builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for sentences in documents:
            builder.add_document(torch.tensor(flat(sentences)), [len(sentence) for sentence in sentences])
        builder.finalize(f"{theirs}.idx")
        for end in (".bin", ".idx"):
            assert Path(f"{ours}{end}").read_bytes() == Path(f"{theirs}{end}").read_bytes()

        dataset, reader = IndexedDataset(str(ours)), IndexedReader(ours)
        assert [dataset[i].tolist() for i in range(len(dataset))] == flat(documents)
        assert [reader.document(i).tolist() for i in range(reader.documents)] == [
            flat(sentences) for sentences in documents
        ]
        reader.deep_check()
        del dataset  # unmaps before the folder goes


def test_summary_counts_and_checksums(tmp_path: Path) -> None:
    from megatron_smol.data.files import sha256_file

    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2, 3, 4], [3, 1])
        writer.add_document([5])
        summary = writer.finalize()
    assert (summary.documents, summary.sequences, summary.tokens, summary.bin_bytes) == (2, 3, 5, 10)
    assert summary.bin_sha256 == sha256_file(tmp_path / "a.bin")
    assert summary.idx_sha256 == sha256_file(tmp_path / "a.idx")
    assert summary.idx_bytes == (tmp_path / "a.idx").stat().st_size


@pytest.mark.parametrize("vocab_size", [256, 49_152, 65_499, 65_500, 128_256])
def test_dtype_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_empty_documents_are_kept_as_megatron_keeps_them(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]], [], [[3]]])
    reader = IndexedReader(tmp_path / "a")
    assert [reader.document(i).tolist() for i in range(3)] == [[1, 2], [], [3]]


def test_nothing_is_visible_before_finalize(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        assert not list(tmp_path.glob("a.bin")) and not list(tmp_path.glob("a.idx"))
    assert list(tmp_path.iterdir()) == []


def test_an_older_pair_survives_a_failed_rewrite(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2, 3]]])
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([9])
        raise RuntimeError
    assert IndexedReader(tmp_path / "a").document(0).tolist() == [1, 2, 3]


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with (
        IndexedWriter(tmp_path / "a", np.uint16) as writer,
        pytest.raises(DataError, match="65536 do not fit"),
    ):
        writer.add_document([1, 65_536])


@pytest.mark.parametrize("kept", [0, 20, 40, -1])
@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path, end: str, kept: int) -> None:
    write(tmp_path / "a", [[list(range(50))]])
    path = tmp_path / f"a{end}"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError) as error:
        IndexedReader(tmp_path / "a")
    assert str(path) in str(error.value)
    assert str(path.stat().st_size) in str(error.value)
    assert end == ".idx" or str(whole) in str(error.value)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_longer_file_is_named(tmp_path: Path, end: str) -> None:
    write(tmp_path / "a", [[list(range(50))]])
    path = tmp_path / f"a{end}"
    path.write_bytes(path.read_bytes() + bytes(2))
    with pytest.raises(DataError, match=f"a\\{end}"):
        IndexedReader(tmp_path / "a")


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path: Path, end: str) -> None:
    write(tmp_path / "a", [[[1]]])
    (tmp_path / f"a{end}").unlink()
    with pytest.raises(DataError, match=f"missing shard file .*a{end}"):
        IndexedReader(tmp_path / "a")


def test_the_index_of_another_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2, 3]]])
    write(tmp_path / "b", [[[1, 2, 3]]], np.int32)
    (tmp_path / "b.idx").rename(tmp_path / "a.idx")
    with pytest.raises(DataError, match=r"a\.bin has 6 bytes but a\.idx describes 12 .*tokenizers"):
        IndexedReader(tmp_path / "a")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(40))
    with pytest.raises(DataError, match="not a Megatron index"):
        IndexedReader(tmp_path / "a")


def test_tables_that_disagree_are_found_by_the_deep_check(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]], [[3, 4]]])
    path = tmp_path / "a.idx"
    data = bytearray(path.read_bytes())
    data[34] = 1  # length of the first sequence
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="tables disagree"):
        IndexedReader(tmp_path / "a").deep_check()


def test_a_bin_that_shrank_after_opening_is_named_and_does_not_crash(tmp_path: Path) -> None:
    write(tmp_path / "a", [[list(range(9000))]])
    reader = IndexedReader(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(b"ab")
    with pytest.raises(DataError, match="has 2 bytes"):
        _ = reader.ids


def test_a_reader_pickles_without_its_tokens(tmp_path: Path) -> None:
    write(tmp_path / "a", [[list(range(9000))]])
    reader = IndexedReader(tmp_path / "a")
    assert reader.ids.size == 9000
    data = pickle.dumps(reader)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).ids, reader.ids)


FULL_DISK = """
import resource, sys
import numpy as np
from megatron_smol.data.indexed import IndexedWriter
from megatron_smol.errors import DataError
prefix, limit, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(100):
            writer.add_document(np.arange(tokens))
        writer.finalize()
except DataError as error:
    print(error)
"""


# 100 documents make an index of 2,042 bytes. Long ones exceed the limit before it is written.
@pytest.mark.parametrize(("end", "limit", "tokens"), [(".bin", 50_000, 1000), (".idx", 1500, 7)])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, end: str, limit: int, tokens: int
) -> None:
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path / "a"), str(limit), str(tokens)]
    out = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert f"no room to write {tmp_path}/a{end}" in out
    needed = int(re.search(r"at least ([\d,]+) bytes are needed", out)[1].replace(",", ""))
    assert limit < needed < limit + 10_000
    assert list(tmp_path.iterdir()) == []
