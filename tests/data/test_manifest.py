"""The manifest: what is read back, what is found on the disk, and what is said when it is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smol.data.indexed import IndexedWriter
from megatron_smol.data.manifest import (
    Manifest,
    ShardRecord,
    TokenizerRecord,
    locate,
    read_manifest,
    tokens_on_disk,
)
from megatron_smol.errors import DataError


def manifest(**changes: Any) -> Manifest:
    shard = ShardRecord(
        prefix="shard-00000",
        tokens=10,
        documents=2,
        sequences=2,
        bin_bytes=20,
        idx_bytes=82,
        bin_sha256="b",
        idx_sha256="i",
    )
    fields: dict[str, Any] = {
        "source": "prose",
        "tokenizer": TokenizerRecord(name="t", sha256="s", vocab_size=600, eod_id=0),
        "dtype": "uint16",
        "tokens": 10,
        "documents": 2,
        "append_eod": True,
        "json_key": "text",
        "sentences": None,
        "keep_newlines": False,
        "seed": 0,
        "empty_documents": 0,
        "bad_lines": 0,
        "dropped_characters": 0,
        "shards": (shard,),
        "inputs": (),
        "versions": {"numpy": "2"},
    }
    return Manifest(**{**fields, **changes})


def write_pair(prefix: Path, tokens: int) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(tokens))
        writer.finalize()


def test_it_reads_back_equal(tmp_path: Path) -> None:
    manifest().write(tmp_path / "manifest.json")
    assert read_manifest(tmp_path / "manifest.json") == manifest()
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"tokens": 10', '"tokens": "ten"', "tokens"),
        ('"version": 1', '"version": 9', "version"),
        ("{", "", "file"),
    ],
)
def test_a_damaged_manifest_names_the_field(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(manifest().model_dump_json(indent=2).replace(old, new, 1))
    with pytest.raises(DataError, match=f"{path} is not a manifest of this version: .*{named}"):
        read_manifest(path)


def test_tokens_on_disk(tmp_path: Path) -> None:
    assert tokens_on_disk(tmp_path / "absent") is None
    assert tokens_on_disk(tmp_path) is None  # an interrupted folder is not there yet
    manifest().write(tmp_path / "manifest.json")
    assert tokens_on_disk(tmp_path) == 10
    write_pair(tmp_path / "web_text_document", 77)
    for name in ("web", "web_text_document", "web_text_document.bin", "web_text_document.idx"):
        assert tokens_on_disk(tmp_path / name) == 77
    manifest(tokens=99).write(tmp_path / "web_text_document.manifest.json")
    assert tokens_on_disk(tmp_path / "web") == 99


def test_half_a_pair_is_an_error_not_absence(tmp_path: Path) -> None:
    write_pair(tmp_path / "web_text_document", 77)
    (tmp_path / "web_text_document.bin").unlink()
    with pytest.raises(DataError, match=r"web_text_document.* not a complete pair"):
        tokens_on_disk(tmp_path / "web")


def test_two_keys_of_one_prefix_are_ambiguous(tmp_path: Path) -> None:
    write_pair(tmp_path / "web_text_document", 7)
    write_pair(tmp_path / "web_title_document", 7)
    with pytest.raises(DataError, match=r"web_text_document, .*web_title_document"):
        locate(tmp_path / "web")
    assert locate(tmp_path / "web_title_document") == (tmp_path / "web_title_document", None)


def test_missing_sources_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="smol preprocess INPUT --output"):
        locate(tmp_path / "absent")
    with pytest.raises(DataError, match="did not finish"):
        locate(tmp_path)


def test_a_plan_reads_manifests_without_numpy_or_torch() -> None:
    code = "import sys, megatron_smol.data.manifest; print({'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
