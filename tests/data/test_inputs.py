"""Files, URLs and data sets in; each document's place of origin and the filters out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smol.data import assembly, corpus, encode, longtext, shuffle
from megatron_smol.data.inputs import expand_inputs, hub_inputs
from megatron_smol.data.manifest import Manifest
from megatron_smol.data.source import load_source
from megatron_smol.data.tokenize import preprocess
from megatron_smol.data.tokenizer import Tokenizer
from megatron_smol.errors import UserError

from .test_tokenize import TEXTS, contents, documents, write_lines


def run(inputs: list[Any], output: Path, tokenizer: Tokenizer, **options: Any) -> Manifest:
    made = preprocess(inputs, output, tokenizer, **({"workers": 1, "source": "s"} | options))
    assert made is not None
    return made


# --- where documents come from -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("shard_tokens", [2000, 1 << 20])
def test_every_document_of_a_shard_is_traced_to_its_row(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, seed: int | None, shard_tokens: int
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 700)
    monkeypatch.setattr(longtext, "_READ_BYTES", 64)
    monkeypatch.setattr(encode, "_PIECE_CHARACTERS", 100)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    long = [text * 9 for text in TEXTS[60:66]]  # more than a block: read in pieces
    texts = [TEXTS[:50], [*TEXTS[50:60], *long], [], ["a text file", "b" * 900], TEXTS[70:120]]
    texts[2] = texts[3]
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "0.txt", "1.txt", "c.parquet")]
    records: list[list[Any]] = [[{"text": text} for text in some] for some in texts]
    records[0].insert(7, "")  # blank lines and empty documents are rows too
    records[0].insert(20, {"text": ""})
    records[1].insert(0, {"text": None})
    write_lines(names[0], records[0])
    write_lines(names[1], records[1])
    for name, text in zip(names[2:4], texts[3], strict=True):
        name.write_text(text)
    parquet.write_table(pyarrow.table({"text": texts[4]}), names[4], row_group_size=17)
    rows: dict[tuple[int, int], str] = {(2, 0): texts[3][0], (3, 0): texts[3][1]}
    for number, some in ((0, records[0]), (1, records[1]), (4, records[4])):
        rows |= {
            (number, row): record["text"] for row, record in enumerate(some) if record and record["text"]
        }

    manifest = run(names, tmp_path / "out", tokenizer, seed=seed, shard_tokens=shard_tokens)
    assert [Path(given.path).name for given in manifest.inputs] == [name.name for name in names]
    found: dict[tuple[int, int], str] = {}
    order = []
    for record in manifest.shards:
        table = np.load(tmp_path / "out" / f"{record.prefix}.docs.npy")
        assert table.size == record.documents and int(table["tokens"].sum()) == record.tokens
        ids = np.fromfile(tmp_path / "out" / f"{record.prefix}.bin", dtype=manifest.dtype)
        for one in table:
            start, count = int(one["first_token"]), int(one["tokens"])
            assert ids[start + count - 1] == tokenizer.eod_id
            order.append((int(one["input"]), int(one["row"])))
            found[order[-1]] = tokenizer.decode(ids[start : start + count - 1])
    assert found == rows and len(order) == len(rows)
    assert (order == sorted(order)) == (seed is None)
    assert documents(load_source(tmp_path / "out"), tokenizer) == [rows[place] for place in order]


def test_no_provenance(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    manifest = run([lines], tmp_path / "out", tokenizer, provenance=False)
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".bin", ".idx", ".json"}
    assert manifest.shards[0].docs_sha256 is None


# --- documents too long to hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "hf"])
@pytest.mark.parametrize("seed", [None, 11])
def test_long_documents_get_the_ids_that_they_get_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, backend: Any, seed: int | None
) -> None:
    long = "".join(f"{text}\n\n don't \u0004 stop 3.14\u3000é東\U0001f600 \ud800" for text in TEXTS[::3])
    records: list[Any] = [{"id": n, "text": text} for n, text in enumerate(TEXTS[:40])]
    records.insert(10, {"id": "x" * 3000, "text": long})
    records.insert(30, {"text": [long[:2000], "", "a sentence. "], "id": 3})
    lines = write_lines(tmp_path / "a.jsonl", records)
    options = {"seed": seed, "backend": backend, "shard_tokens": 2000, "provenance": False}
    made = []
    for name, block_bytes in (("whole", 1 << 20), ("pieces", 1000)):
        monkeypatch.setattr(corpus, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(longtext, "_READ_BYTES", 61)
        monkeypatch.setattr(encode, "_PIECE_CHARACTERS", 150)
        monkeypatch.setattr(assembly, "_COPY_BYTES", 64)
        made.append(run([lines], tmp_path / name, tokenizer, **options))
    assert made[0].dropped_characters == made[1].dropped_characters > 100
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert sorted(documents_of(whole)) == sorted(documents_of(pieces))
    if seed is None:  # else the order depends on how the input was cut
        assert documents_of(whole) == documents_of(pieces)
    # Cut alike, but no document tokenized in pieces: the same bytes, in the same order.
    monkeypatch.setattr(encode.Settings, "cuts_long_documents", False)
    run([lines], tmp_path / "held", tokenizer, **options)
    shards = [sorted(folder.glob("shard-*")) for folder in (pieces, tmp_path / "held")]
    assert [file.name for file in shards[0]] == [file.name for file in shards[1]] != []
    for one, other in zip(*shards, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def documents_of(folder: Path) -> list[list[int]]:
    return [
        shard.document(index).tolist()
        for shard in load_source(folder).shards
        for index in range(shard.documents)
    ]


def test_a_long_document_that_cannot_be_cut_is_told_or_skipped(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(longtext, "_READ_BYTES", 500)
    monkeypatch.setattr(encode, "_PIECE_CHARACTERS", 500)
    monkeypatch.setattr(encode, "_UNCUT_CHARACTERS", 2000)
    records = [{"text": "before"}, {"text": "first " + "x" * 5000}, {"text": "after"}]
    lines = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=r"a\.jsonl line 2: 2,\d+ characters without a space.*--skip-bad"):
        run([lines], tmp_path / "out", tokenizer)
    manifest = run([lines], tmp_path / "out", tokenizer, skip_bad=True, seed=None)
    assert (manifest.documents, manifest.bad_lines) == (2, 1)
    assert documents(load_source(tmp_path / "out"), tokenizer) == ["before", "after"]


def test_a_long_line_that_is_bad_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 300)
    monkeypatch.setattr(longtext, "_READ_BYTES", 50)
    monkeypatch.setattr(encode, "_PIECE_CHARACTERS", 50)
    bad = json.dumps({"text": "some words " * 100, "url": 1})[
        :-1
    ]  # the end is missing: all text has been seen
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "before"}, bad, {"text": "after"}])
    with pytest.raises(UserError, match=r"a\.jsonl line 2: not one JSON object"):
        run([lines], tmp_path / "out", tokenizer)
    manifest = run([lines], tmp_path / "out", tokenizer, skip_bad=True, seed=None)
    assert (manifest.documents, manifest.bad_lines) == (2, 1)
    assert documents(load_source(tmp_path / "out"), tokenizer) == ["before", "after"]


def test_many_parts_and_runs_give_the_order_of_one(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory bounds decide how work is cut, never the result."""
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    run([lines], tmp_path / "one", tokenizer)
    for target, name, value in (
        (encode, "_PART_TOKENS", 300),
        (encode, "_BATCH_CHARACTERS", 200),
        (shuffle, "_PUT_TOKENS", 150),
        (shuffle, "_VIEWED_TOKENS", 10**9),
    ):
        monkeypatch.setattr(target, name, value)
    monkeypatch.setattr(assembly, "RUN_TOKENS", 1000)
    run([lines], tmp_path / "many", tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


# --- filters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1 << 20, 200])
def test_documents_outside_the_token_limits_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block_bytes)
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in [*TEXTS, ""]])
    sizes = {text: ids.size for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True)}
    least, most = (int(np.percentile(list(sizes.values()), part)) for part in (30, 70))
    kept = [text for text in TEXTS if least <= sizes[text] <= most]
    manifest = run([lines], tmp_path / "out", tokenizer, min_doc_tokens=least, max_doc_tokens=most, seed=None)
    assert documents(load_source(tmp_path / "out"), tokenizer) == kept
    assert manifest.short_documents == sum(size < least for size in sizes.values()) > 0
    assert manifest.long_documents == sum(size > most for size in sizes.values()) > 0
    assert manifest.filtered_tokens == sum(sizes.values()) - sum(sizes[text] for text in kept)
    assert (manifest.empty_documents, manifest.min_doc_tokens, manifest.max_doc_tokens) == (1, least, most)
    with pytest.raises(UserError, match="made with another min_doc_tokens"):
        run([lines], tmp_path / "out", tokenizer, min_doc_tokens=least + 1, max_doc_tokens=most, seed=None)


def test_limits_that_let_nothing_through(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    for limits in ({"min_doc_tokens": 0}, {"min_doc_tokens": 9, "max_doc_tokens": 8}, {"max_doc_tokens": 0}):
        with pytest.raises(UserError, match="let no document through"):
            run([lines], tmp_path / "out", tokenizer, **limits)
    with pytest.raises(UserError, match="240 documents are outside --min-doc-tokens"):
        run([lines], tmp_path / "out", tokenizer, min_doc_tokens=10**6)


# --- data sets and URLs --------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the hub's layout: two configurations of parquet files."""
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "corpus"
    for config, texts in (("web", TEXTS[:30]), ("books", TEXTS[30:50])):
        (folder / config).mkdir(parents=True)
        for number in range(2):
            table = pyarrow.table({"text": texts[number::2], "id": list(range(len(texts[number::2])))})
            parquet.write_table(table, folder / config / f"train-{number:05d}-of-00002.parquet")
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/*.parquet\n"
        for config in ("web", "books")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_a_data_set_is_its_files(tmp_path: Path, dataset: Path, tokenizer: Tokenizer) -> None:
    files = hub_inputs(str(dataset), "books", "train", None)
    assert [Path(file.name).name for file in files] == [f"train-{n:05d}-of-00002.parquet" for n in (0, 1)]
    run(list(files), tmp_path / "out", tokenizer, seed=None)
    expected = [*TEXTS[30:50:2], *TEXTS[31:50:2]]
    assert documents(load_source(tmp_path / "out"), tokenizer) == expected


def test_a_data_set_that_is_not_there(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no split 'test': .*train"):
        hub_inputs(str(dataset), "web", "test", None)
    with pytest.raises(UserError, match="cannot open the data set"):
        hub_inputs(str(dataset), "nothing", "train", None)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("text\nhello\n")
    with pytest.raises(UserError, match=r"train\.csv; only JSON lines, parquet and text are read"):
        hub_inputs(str(tmp_path / "tables"), None, "train", None)


def test_urls_are_read_in_place(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1500)
    memory = fsspec.filesystem("memory")
    local = [
        write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:100]]),
        write_lines(tmp_path / "b.jsonl.gz", [{"text": text} for text in TEXTS[100:200]]),
        tmp_path / "c.txt",
    ]
    local[2].write_text("A text file. " * 300)
    for path in local:
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        run(local, tmp_path / "local", tokenizer)
        whole = contents(tmp_path / "local")
        for name, urls in (("glob", ["memory://bucket/*"]), ("folder", ["memory://bucket"])):
            made = run(urls, tmp_path / name, tokenizer)
            assert [given.path for given in made.inputs] == [
                f"memory:///bucket/{path.name}" for path in local
            ]
            found = contents(tmp_path / name)
            assert {key: found[key] for key in found if "shard" in key} == {
                key: whole[key] for key in whole if "shard" in key
            }
        again = run(["memory://bucket"], tmp_path / "folder", tokenizer)
        assert again == made
        with pytest.raises(UserError, match=r"cannot read memory://bucket/no\.jsonl \(FileNotFoundError"):
            run(["memory://bucket/no.jsonl"], tmp_path / "out", tokenizer)
        with pytest.raises(UserError, match=r"no input at memory://bucket/\*\.parquet"):
            expand_inputs(["memory://bucket/*.parquet"])
        with pytest.raises(UserError, match="cannot read nothing://x"):
            expand_inputs(["nothing://x/y.jsonl"])
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_store_s_own_version_stands_for_the_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from dataclasses import replace

    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    (given,) = expand_inputs([f"file://{lines}"])
    made = run([replace(given, version="etag-1")], tmp_path / "out", tokenizer)
    assert (made.inputs[0].sha256, made.inputs[0].etag) == ("", "etag-1")
    with pytest.raises(UserError, match="made with another inputs"):
        run([replace(given, version="etag-2")], tmp_path / "out", tokenizer)


def test_a_large_enough_source_has_shards_for_several_workers(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    counts = {}
    for tiny in (10**9, 4000, 100):
        monkeypatch.setattr(assembly, "_TINY_TOKENS", tiny)
        made = run([lines], tmp_path / str(tiny), tokenizer)
        counts[tiny] = len(made.shards)
        assert sorted(documents(load_source(tmp_path / str(tiny)), tokenizer)) == sorted(TEXTS)
    assert counts == {10**9: 1, 4000: made.tokens // 4000, 100: 8}
