"""Text to shards: the same bytes whatever the workers, the kills and the disk; every document once."""

from __future__ import annotations

import fcntl
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smol.data import corpus
from megatron_smol.data.corpus import cut_units
from megatron_smol.data.indexed import IndexedReader
from megatron_smol.data.inputs import expand_inputs
from megatron_smol.data.manifest import Manifest
from megatron_smol.data.reading import Reading
from megatron_smol.data.shuffle import document_keys
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.data.tokenize import preprocess
from megatron_smol.data.tokenizer import Tokenizer
from megatron_smol.data.workers import Workers
from megatron_smol.errors import DataError, UserError
from tests.tiny import environment

TEXTS = [f"document {number}: " + "the plan of a run, counted once. " * (number % 7) for number in range(240)]


def write_lines(path: Path, records: list[Any]) -> Path:
    lines = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    data = lines.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1500)


def documents(source: TokenSource, tokenizer: Tokenizer) -> list[str]:
    """Decoded, without the end-of-document token, which each must have exactly once."""
    texts = []
    for shard in source.shards:
        for index in range(shard.documents):
            ids = shard.document(index)
            assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
            texts.append(tokenizer.decode(ids[:-1]))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_order(lines: Path, seed: int | None) -> list[str]:
    """The order that a seed stands for: all documents by their keys, however they are cut into shards."""
    keyed: list[tuple[int, str]] = []
    (unit,) = cut_units(expand_inputs([lines]))
    for block in unit.blocks(lines.parent):
        texts = [row.document[0] for row in Reading(block, "text").documents()]
        keys = itertools.count(len(keyed))
        if seed is not None:
            keys = document_keys(seed, 0, block.index, np.arange(len(texts))).tolist()
        keyed += zip(keys, texts, strict=False)
    return [text for _, text in sorted(keyed)]


def run(inputs: list[Path], output: Path, tokenizer: Tokenizer, **options: Any) -> Manifest:
    return preprocess(inputs, output, tokenizer, **{"workers": 1, **options})


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shard_tokens", [1000, 1 << 20])
@pytest.mark.parametrize("seed", [None, 7])
def test_every_document_once_in_any_number_of_shards(
    tmp_path: Path, lines: Path, tokenizer: Tokenizer, seed: int | None, shard_tokens: int
) -> None:
    manifest = run([lines], tmp_path / "out", tokenizer, seed=seed, shard_tokens=shard_tokens, source="prose")
    source = load_source(tmp_path / "out")
    source.deep_check()
    source.check_tokenizer(tokenizer)
    assert (source.name, source.tokens, source.documents) == ("prose", manifest.tokens, len(TEXTS))
    assert (len(source.shards) > 1) == (shard_tokens < manifest.tokens)
    found = documents(source, tokenizer)
    assert Counter(found) == Counter(TEXTS)
    assert found == in_order(lines, seed)
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {
        ".bin",
        ".idx",
        ".npy",
        ".json",
    }  # no work folder


@pytest.mark.usefixtures("small_blocks")
def test_the_seed_decides_the_order(tmp_path: Path, lines: Path, tokenizer: Tokenizer) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run([lines], tmp_path / name, tokenizer, seed=seed, source="s")
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["shard-00000.bin"] != c["shard-00000.bin"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), blocks=st.integers(1, 3), count=st.integers(0, 50))
def test_no_two_documents_share_a_key(seed: int, blocks: int, count: int) -> None:
    places = [(unit, block) for unit in (0, 1, 2**22 - 1) for block in (*range(blocks), 2**18 - 1)]
    rows = np.append(np.arange(count), 2**24 - 1)
    keys = np.concatenate([document_keys(seed, *place, rows) for place in places])
    assert keys.dtype == np.uint64 and len(set(keys.tolist())) == len(places) * rows.size


@pytest.mark.parametrize("place", [(2**22, 0, 0), (0, 2**18, 0), (0, 0, 2**24)])
def test_inputs_of_more_parts_than_keys_can_tell_apart_are_refused(place: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="more than"):
        document_keys(0, *place[:2], np.array(place[2:]))


def test_the_shuffle_is_uniform() -> None:
    """Each of 8 documents comes first about equally often over 4,000 seeds (4.5 standard deviations)."""
    first = Counter(int(np.argmin(document_keys(seed, 2, 3, np.arange(8)))) for seed in range(4000))
    assert set(first) == set(range(8))
    assert max(abs(count - 500) for count in first.values()) < 4.5 * (4000 * 7 / 64) ** 0.5


@pytest.mark.usefixtures("small_blocks")
def test_workers_do_not_change_a_byte(tmp_path: Path, lines: Path, tokenizer: Tokenizer) -> None:
    for workers in (1, 2):
        run([lines], tmp_path / str(workers), tokenizer, workers=workers, shard_tokens=1000, source="s")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


# Says which blocks are made. With a victim, the one that would add record number `records` kills itself or its parent
# instead: the parts of its block are there, the record is not.
SCRIPT = """
import os, signal, sys
from megatron_smol.data import corpus, encode
from megatron_smol.data.tokenize import preprocess

given, output, tokenizer, workers, victim, records = sys.argv[1:]
write = encode.write_whole

def dying(path, text):
    if path.name.startswith("block-"):
        if victim and len(list(path.parent.glob("block-*.json"))) >= int(records):
            os.kill(os.getppid() if victim == "parent" else os.getpid(), signal.SIGKILL)
        os.write(1, f"{path.name}\\n".encode())  # at once: two workers write to one pipe
    write(path, text)

encode.write_whole = dying  # in a worker too, which imports this file
if __name__ == "__main__":
    corpus.BLOCK_BYTES = 1000
    preprocess([given], output, tokenizer, workers=int(workers), shard_tokens=4000, source="s")
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_and_the_same_command_again_give_the_same_bytes(
    tmp_path: Path, lines: Path, tokenizer_folder: Path, tokenizer: Tokenizer, workers: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out, whole = tmp_path / "out", tmp_path / "whole"

    def command(output: Path, victim: str = "", records: int = 0) -> subprocess.CompletedProcess[str]:
        given = [script, lines, output, tokenizer_folder, workers, victim, records]
        line = [sys.executable, *map(str, given)]
        return subprocess.run(line, env=environment(), capture_output=True, text=True)

    # With workers, the first time the parent is killed, the second time one of them.
    for records, victim in ((3, "parent" if workers > 1 else "itself"), (12, "itself")):
        killed = command(out, victim, records)
        assert killed.returncode == (1 if workers > 1 and victim == "itself" else -signal.SIGKILL), killed
        kept = {file.name for file in out.glob(".source.preprocess/*/block-*.json")}
        assert len(kept) >= records
    with pytest.raises(DataError, match="did not finish"):
        load_source(out)
    again = command(out)
    assert again.returncode == 0, again.stderr
    assert "continuing the interrupted run" in again.stderr
    made = again.stdout.split()
    assert made and not kept & set(made), "a finished block was done again"
    uninterrupted = command(whole)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert sorted([*kept, *made]) == sorted(uninterrupted.stdout.split())
    assert contents(out) == contents(whole)
    assert Counter(documents(load_source(out), tokenizer)) == Counter(TEXTS)


def test_a_worker_that_dies_is_told() -> None:
    with Workers(2, "unused") as pool, pytest.raises(DataError, match="worker process was killed"):
        list(pool.run([Suicide()]))


class Suicide:
    def run(self, settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": "cut off', r"not one JSON object \(Unterminated string"),
        ('["text"]', "expected one JSON object a line, found a list"),
        ('{"body": "x", "url": "y"}', "no key 'text'; found: body, url"),
        ('{"text": 3}', "key 'text' holds a int"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_a_bad_line_is_named_or_skipped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, name: str, line: str, why: str
) -> None:
    records: list[Any] = [{"text": text} for text in TEXTS]
    records.insert(200, line)  # far behind the first block; line 201
    records.insert(3, "")  # a blank line is nothing, but counts as a line
    path = write_lines(tmp_path / name, records)
    with pytest.raises(DataError, match=rf"{name} line 202: {why}.*--skip-bad"):
        run([path], tmp_path / "out", tokenizer)
    manifest = run([path], tmp_path / "out", tokenizer, skip_bad=True)
    assert (manifest.bad_lines, manifest.documents, manifest.empty_documents) == (1, len(TEXTS), 0)


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [
        {"text": "a"},
        {"text": ""},
        {"text": None},
        {"text": "\x04"},
        {"text": "b\x1db \ud800c"},
        {"text": []},
    ]
    manifest = run([write_lines(tmp_path / "in.jsonl", records)], tmp_path / "out", tokenizer, seed=None)
    assert (manifest.documents, manifest.empty_documents, manifest.dropped_characters) == (2, 4, 3)
    assert documents(load_source(tmp_path / "out"), tokenizer) == ["a", "bb c"]


def test_all_kinds_of_input_give_the_same_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["one\r\ntwo", "größe 12", "three"]
    records = [{"text": text} for text in texts]
    inputs: dict[str, list[Path]] = {
        "lines": [write_lines(tmp_path / "a.jsonl", records)],
        "gz": [write_lines(tmp_path / "a.jsonl.gz", records)],
        "two": [
            write_lines(tmp_path / "b.json", records[:1]),
            write_lines(tmp_path / "c.jsonl.gz", records[1:]),
        ],
    }
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(text.encode())
    inputs["folder"] = [tmp_path / "texts"]
    inputs["glob"] = [tmp_path / "texts" / "*.txt"]
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + inputs["lines"][0].read_bytes().rstrip(b"\n"))
    inputs["byte order mark, no last newline"] = [tmp_path / "bom.jsonl"]
    for name, given_inputs in inputs.items():
        run(given_inputs, tmp_path / "out" / name, tokenizer, seed=None)
        assert documents(load_source(tmp_path / "out" / name), tokenizer) == texts, name


@pytest.mark.parametrize("kind", ["zst", "parquet"])
def test_optional_kinds_of_input(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    texts = ["one", "two", "three"]
    if kind == "zst":
        zstandard = pytest.importorskip("zstandard")
        path = tmp_path / "in.jsonl.zst"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(zstandard.compress(lines[:20]) + zstandard.compress(lines[20:]))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "in.parquet"
        parquet.write_table(pyarrow.table({"text": texts, "url": texts}), path, row_group_size=2)
        with pytest.raises(DataError, match="no column 'body'; found: text, url"):
            run([path], tmp_path / "out", tokenizer, json_key="body")
    run([path], tmp_path / "out", tokenizer, seed=None)
    assert documents(load_source(tmp_path / "out"), tokenizer) == texts


def test_a_file_that_begins_with_rows_without_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The first rows are those on which the two tokenizers are compared."""
    rows = write_lines(tmp_path / "in.jsonl", [{"text": None}] * 200 + [{"text": "one"}])
    run([rows], tmp_path / "out", tokenizer, seed=None)
    assert documents(load_source(tmp_path / "out"), tokenizer) == ["one"]


def test_inputs_that_are_not_there(tmp_path: Path, lines: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no input at .*nothing\*\.jsonl: give files"):
        run([tmp_path / "nothing*.jsonl"], tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match="named twice"):
        run([lines, tmp_path / "*.jsonl"], tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match="no documents with text"):
        run([write_lines(tmp_path / "empty.jsonl", [])], tmp_path / "out", tokenizer)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:30])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz cannot be decompressed"):
        run([tmp_path / "cut.jsonl.gz"], tmp_path / "out", tokenizer)


def test_a_finished_output_is_kept_refused_replaced_or_mended(
    tmp_path: Path, lines: Path, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    first = run([lines], out, tokenizer, shard_tokens=1000)
    shard = out / "shard-00001.bin"
    written = shard.stat().st_mtime_ns
    assert run([lines], out, tokenizer, shard_tokens=1000) == first
    assert shard.stat().st_mtime_ns == written

    moved = lines.rename(tmp_path / "renamed.jsonl")
    assert run([moved], out, tokenizer, shard_tokens=1000) == first  # the same content
    moved.rename(lines)
    with pytest.raises(UserError, match="was made with another seed; use --overwrite"):
        run([lines], out, tokenizer, seed=5)
    before = contents(out)
    shard.write_bytes(b"")
    assert run([lines], out, tokenizer, shard_tokens=1000) == first
    assert contents(out) == before

    lines.write_text(lines.read_text() + '{"text": "one more"}\n')
    with pytest.raises(UserError, match="another inputs"):
        run([lines], out, tokenizer)
    assert run([lines], out, tokenizer, overwrite=True).documents == len(TEXTS) + 1
    assert {file.name for file in out.iterdir()} == {
        "manifest.json",
        *(f"shard-00000.{end}" for end in ("bin", "idx", "docs.npy")),
    }


def test_foreign_shards_are_not_overwritten(tmp_path: Path, lines: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "web.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"web\.bin exists and was not made by this command"):
        run([lines], tmp_path / "web", tokenizer, layout="prefix")
    assert (tmp_path / "web.bin").read_bytes() == b"precious"


def test_two_writers_at_one_place(tmp_path: Path, lines: Path, tokenizer: Tokenizer) -> None:
    work = tmp_path / "out" / ".source.preprocess"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another command is writing to .*out"):
            run([lines], tmp_path / "out", tokenizer)
    assert run([lines], tmp_path / "out", tokenizer).documents == len(TEXTS)


FULL_DISK = SCRIPT.replace(
    "    corpus.BLOCK_BYTES = 1000\n",
    "    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n",
)


def test_a_full_disk_stops_cleanly_and_the_next_run_completes(
    tmp_path: Path, lines: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    given = [lines, tmp_path / "out", tokenizer_folder, 1, "", 0]
    command = [sys.executable, "-c", FULL_DISK, *map(str, given)]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "DiskError: no room to write" in failed.stderr and "bytes are needed" in failed.stderr
    assert not list((tmp_path / "out").rglob("*.bin")) and not list((tmp_path / "out").rglob("*.partial"))
    run([lines], tmp_path / "out", tokenizer)
    assert Counter(documents(load_source(tmp_path / "out"), tokenizer)) == Counter(TEXTS)


def test_no_end_of_document_when_not_asked_for(tmp_path: Path, lines: Path, tokenizer: Tokenizer) -> None:
    run([lines], tmp_path / "out", tokenizer, append_eod=False)
    source = load_source(tmp_path / "out")
    assert source.eod_id is None and tokenizer.eod_id not in source.read(0, source.tokens)


def test_text_that_is_split_already_keeps_its_sequences(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"text": ["One.", "", "Two."]}, {"text": "Three."}]
    run([write_lines(tmp_path / "in.jsonl", records)], tmp_path / "a", tokenizer, layout="prefix", seed=None)
    reader = IndexedReader(tmp_path / "a")
    assert (reader.documents, reader.sequences) == (2, 3)
    assert [tokenizer.decode(reader.document(index)) for index in range(2)] == [
        "One.Two.<|endoftext|>",
        "Three.<|endoftext|>",
    ]


@pytest.mark.parametrize("keep", [False, True])
def test_sentences(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    punkt = pytest.importorskip("nltk.tokenize.punkt")
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    path = write_lines(tmp_path / "in.jsonl", [{"text": "It ran.\n\nDr. Who saw it. Twice!"}])
    options: dict[str, Any] = {
        "split_sentences": True,
        "keep_newlines": keep,
        "seed": None,
        "layout": "prefix",
    }
    with pytest.raises(UserError, match=r"python -m nltk\.downloader punkt_tab"):
        run([path], tmp_path / "a", tokenizer, **options)

    model = punkt.PunktParameters()
    model.abbrev_types.add("dr")
    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    punkt.save_punkt_params(model, str(folder))
    run([path], tmp_path / "a", tokenizer, **options)
    reader = IndexedReader(tmp_path / "a")
    ends = np.cumsum(reader.lengths)
    sentences = [tokenizer.decode(ids) for ids in np.split(reader.ids, ends)[:-1]]
    if keep:
        assert sentences == ["It ran.\n\n", "Dr. Who saw it. ", "Twice!<|endoftext|>"]
    else:
        assert sentences == ["It ran.", "Dr. Who saw it.", "Twice!<|endoftext|>"]
