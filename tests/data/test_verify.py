"""`smol data verify`: every kind of damage is found, all of it, and nothing that is whole is accused."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_smol.data.indexed import IndexedWriter
from megatron_smol.data.manifest import read_manifest
from megatron_smol.data.verify import verify_source
from tests.data.test_source import SHARDS, write_source
from tests.tiny import TinyRun, environment, smol


def problems(folder: Path, deep: bool = False) -> list[str]:
    return [f"{damage.file}: {damage.problem}" for damage in verify_source(str(folder), deep).damages]


def test_a_whole_source(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    seen: list[int] = []
    for deep in (False, True):
        seen.clear()
        verdict = verify_source(str(tmp_path), deep, advance=seen.append)
        assert not verdict.damages and (verdict.source, verdict.shards, verdict.tokens) == ("prose", 3, 10)
        assert sum(seen) == verdict.bytes == sum(file.stat().st_size for file in tmp_path.glob("shard*"))


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    (tmp_path / "shard-00000.bin").unlink()
    os.truncate(tmp_path / "shard-00001.idx", 30)
    path = tmp_path / "shard-00002.idx"
    path.write_bytes(b"X" + path.read_bytes()[1:])
    found = problems(tmp_path)
    assert len(found) == 3
    assert "missing shard file" in found[0] and "shard-00000.bin" in found[0]
    assert "shard-00001.idx has 30 bytes" in found[1]
    assert "shard-00002.idx is not a Megatron index" in found[2]


def flip(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "at", "value", "says"),
    [
        ("shard-00000.bin", 0, b"\x09", "shard-00000.bin changed since it was written"),
        ("shard-00000.bin", 4, b"\x09", "1 documents that do not end with the end-of-document id 3"),
        ("shard-00002.bin", 2, b"\xff\xff", "holds id 65535; the vocabulary ends at 50000"),
        ("shard-00000.idx", 34, b"\x01", "shard-00000.idx is damaged inside: its tables disagree"),
        ("shard-00000.idx", 38, b"\x07", "shard-00000.idx"),
        ("shard-00000.idx", 66, b"\x63", "shard-00000.idx"),
    ],
)
def test_what_only_the_deep_check_sees(tmp_path: Path, name: str, at: int, value: bytes, says: str) -> None:
    write_source(tmp_path, SHARDS)
    flip(tmp_path / name, at, value)
    assert any(says in problem for problem in problems(tmp_path, deep=True)), problems(tmp_path, deep=True)


def test_a_flipped_bit_anywhere_in_the_tokens(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    chance, shards = random.Random(2), sorted(tmp_path.glob("*.bin"))
    for _ in range(100):
        shard = chance.choice(shards)
        data = shard.read_bytes()
        at = chance.randrange(len(data))
        flip(shard, at, bytes([data[at] ^ 1 << chance.randrange(8)]))
        assert any(shard.name in problem for problem in problems(tmp_path, deep=True)), (shard, at)
        shard.write_bytes(data)
    assert problems(tmp_path, deep=True) == []


def test_a_shard_rewritten_with_other_documents(tmp_path: Path) -> None:
    """Sizes agree, but the header says something else."""
    write_source(tmp_path, SHARDS)
    with IndexedWriter(tmp_path / "shard-00001", np.int16) as writer:
        writer.add_document([9])
        writer.finalize()
    assert "found 1 tokens in 1 documents of int16" in problems(tmp_path)[0]


def test_a_manifest_whose_counts_do_not_add_up(tmp_path: Path) -> None:
    write_source(tmp_path, SHARDS)
    read_manifest(tmp_path / "manifest.json").model_copy(update={"tokens": 11}).write(
        tmp_path / "manifest.json"
    )
    assert "says 11 tokens, its shards add up to 10" in problems(tmp_path)[0]


def test_no_manifest(tmp_path: Path) -> None:
    assert "did not finish" in problems(tmp_path)[0]
    with IndexedWriter(tmp_path / "web", np.uint16) as writer:
        writer.add_document([1, 2])
        writer.add_document([3])
        writer.finalize()
    assert problems(tmp_path / "web", deep=True) == []
    flip(tmp_path / "web.idx", 34, b"\x01")
    assert "tables disagree" in problems(tmp_path / "web", deep=True)[0]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        smol("data", "verify", *arguments), env=environment(), capture_output=True, text=True, timeout=120
    )


def test_the_command_checks_all_sources_of_a_recipe(tiny: TinyRun) -> None:
    done = run(tiny.recipe, "--deep")
    assert done.returncode == 0 and done.stdout.count(": whole (every byte read") == 3, done.stderr
    write_source(tiny.folder / "bad", SHARDS)
    write_source(tiny.folder / "worse", SHARDS)
    for name in ("bad/shard-00001.bin", "worse/shard-00000.bin", "worse/shard-00002.idx"):
        (tiny.folder / name).unlink()
    done = run(tiny.data / "web", tiny.folder / "bad", tiny.folder / "worse", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 3 and not found["whole"]
    assert [len(source["damages"]) for source in found["sources"]] == [0, 1, 2]
    done = run(tiny.folder / "bad", tiny.folder / "worse")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 3 and len(errors) == 3 and "Traceback" not in done.stderr
