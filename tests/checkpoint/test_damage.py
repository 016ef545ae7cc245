"""Every file of a real checkpoint, damaged in every way or made hostile: seen before anything is loaded, and named."""

from __future__ import annotations

import io
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_smol.checkpoint import folder
from megatron_smol.errors import CheckpointError
from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import Layout

TP2 = Layout(2, {"tp": 2})  # both ranks write tensors
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "emptied": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data.removesuffix(b"\n")[:-1],  # a line's end says nothing
    "one byte longer": lambda data: data + b"\0",
    "gone": lambda data: None,
}
FLIPS = 100


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "one-00000003"
    run_ranks(ranks.save_and_go_on, 2, str(path), TP2)
    return path


@pytest.fixture
def two(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoint, and the same as a later step, to be damaged."""
    good, bad = tmp_path / "one-00000003", tmp_path / "one-00000004"
    shutil.copytree(saved, good)
    copy_as_later(saved, bad)
    return good, bad


def copy_as_later(saved: Path, bad: Path) -> None:
    shutil.copytree(saved, bad)
    state = bad / folder.STATE
    state.write_text(state.read_text().replace('"step": 3', '"step": 4'))
    hash_again(bad)


def hash_again(path: Path) -> None:
    """complete.json as whoever wrote these files would have written it."""
    names = [file.name for file in path.iterdir() if file.name != folder.COMPLETE]
    folder.write_json(
        path / folder.COMPLETE, {"format": folder.FORMAT, "files": folder.describe_files(path, names)}
    )


def test_every_file_damaged_in_every_way(saved: Path, two: tuple[Path, Path]) -> None:
    """35 cases: the damaged one is named, put aside, and the one before is used."""
    good, bad = two
    names = sorted(path.name for path in bad.iterdir())
    assert len(names) == 7 and len([name for name in names if name.endswith(".distcp")]) == 2, names
    for name in names:
        for how, damage in DAMAGES.items():
            said: list[str] = []
            content = damage((bad / name).read_bytes())
            (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
            found = folder.choose_newest(good.parent, said.append)
            assert found is not None and found.path == good, (name, how)
            named = str(bad / name) if (name, how) != (folder.COMPLETE, "gone") else f"{bad} has no {name}"
            assert len(said) == 1 and named in said[0], (name, how, said)
            shutil.rmtree(bad.with_name(f"{folder.DAMAGED}{bad.name}"))
            copy_as_later(saved, bad)
    found = folder.choose_newest(good.parent)
    assert found is not None and found.path == bad, "what is whole is not accused"


def test_a_flipped_bit_anywhere_in_the_tensors(two: tuple[Path, Path]) -> None:
    _, path = two
    chance, shards = random.Random(4), sorted(path.glob("*.distcp"))
    for _ in range(FLIPS):
        shard = chance.choice(shards)
        data = bytearray(shard.read_bytes())
        at, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        data[at] ^= bit
        shard.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{shard.name} does not have the checksum"):
            folder.verify_files(path)
        data[at] ^= bit
        shard.write_bytes(data)
    folder.verify_files(path)


def test_a_checkpoint_that_lost_its_mark_never_means_from_zero(two: tuple[Path, Path]) -> None:
    """A save publishes by renaming what has its complete.json: a folder without one was damaged later."""
    for path in two:
        (path / folder.COMPLETE).unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* complete\.json"):
        folder.choose_newest(two[0].parent)
    shutil.rmtree(two[0])
    shutil.rmtree(two[1])
    (two[0].parent / "notes").mkdir()
    assert folder.choose_newest(two[0].parent) is None, "a person's own folder is no checkpoint"


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def as_pickle(path: Path, name: str, hostile: Hostile) -> None:
    (path / name).write_bytes(pickle.dumps(hostile))


def as_torch_file(path: Path, name: str, hostile: Hostile) -> None:
    torch.save({"content_metadata": hostile}, path / name)


def in_place_of_a_tensor(path: Path, name: str, hostile: Hostile) -> None:
    """Every stored tensor of the file becomes an object that runs code, and the metadata points at it."""
    stream = io.BytesIO()
    torch.save(hostile, stream)
    (path / name).write_bytes(stream.getvalue())
    metadata = FileSystemReader(path).read_metadata()
    for place in metadata.storage_data.values():
        if place.relative_path == name:
            place.offset, place.length = 0, len(stream.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def load_each(paths: list[str]) -> list[str]:
    """What is raised on this rank for each of them."""
    from megatron_smol.checkpoint import store

    running, said = ranks.engine(TP2), []
    for path in paths:
        try:
            store.load(running, folder.read_checkpoint(Path(path)))
        except CheckpointError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


HOSTILE: list[tuple[str, Callable[..., None], str]] = [
    (".metadata", as_pickle, "it is damaged or hostile, and was not loaded"),
    ("common.pt", as_pickle, "damaged or hostile, and was not loaded"),
    ("common.pt", as_torch_file, "Unsupported global: GLOBAL getattr"),
    ("metadata.json", as_pickle, "decode byte"),
    ("__0_0.distcp", as_pickle, "failed: "),
    ("__1_0.distcp", in_place_of_a_tensor, "Unsupported global: GLOBAL getattr"),
]


def test_no_file_runs_code(saved: Path, tmp_path: Path) -> None:
    """Not even with hashes that agree: those are no signature."""
    canary, paths = tmp_path / "canary", []
    for number, (name, how, _) in enumerate(HOSTILE):
        path = tmp_path / f"one-{number:08d}"
        shutil.copytree(saved, path)
        how(path, name, Hostile(canary))
        hash_again(path)
        folder.verify_files(path)
        paths.append(str(path))
    told = run_ranks(load_each, 2, paths)
    assert not canary.exists()
    for said in told:
        for (name, _, why), path, line in zip(HOSTILE, paths, said, strict=True):
            assert path in line and why in line and "\n" not in line, (name, line)
