"""Distributed checkpoints: bit-equal on the same layout, right on others, whole or absent, never executed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint import folder, safe, store
from megatron_smol.errors import CheckpointError
from tests import ranks
from tests.helpers import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of step 3 written at DP 2, and the curve of the run that went on."""
    path = tmp_path_factory.mktemp("saved") / "one-00000003"
    return path, run_ranks(ranks.save_and_go_on, 2, str(path), 1, 1)[0]


def test_same_layout_goes_on_bit_equal(saved: tuple[Path, Any]) -> None:
    path, expected = saved
    assert run_ranks(ranks.load_and_go_on, 2, str(path), 1, 1)[0] == expected


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 2, 1), (2, 1, 2), (1, 1, 1), (4, 2, 1)])
def test_another_layout_goes_on_to_rounding(saved: tuple[Path, Any], world: int, tp: int, pp: int) -> None:
    path, expected = saved
    found = run_ranks(ranks.load_and_go_on, world, str(path), tp, pp)[0]
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert (loss, norm) == pytest.approx((expected_loss, expected_norm), rel=1e-5)


def test_precision_may_change(saved: tuple[Path, Any]) -> None:
    path, expected = saved
    found = run_ranks(ranks.load_and_go_on, 2, str(path), 1, 1, "bf16")[0]
    for (loss, _), (expected_loss, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-2)


def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing(tmp_path: Path) -> None:
    for message, left in run_ranks(ranks.save_fails, 2, str(tmp_path / "one-00000003")):
        assert "No space left on device" in message
        assert left == []


def test_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5 * 10**6, 5 * 10**6))
    with pytest.raises(CheckpointError, match=r"5\.0 MB free and a checkpoint needs up to 16\.0 MB"):
        store._require_space(tmp_path, store.bytes_needed(10**6))


def test_metadata_of_a_real_checkpoint_passes(saved: tuple[Path, Any]) -> None:
    safe.check_metadata(saved[0])


def test_a_hostile_pickle_is_not_executed(saved: tuple[Path, Any], tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="hostile"):
        safe.check_metadata(tmp_path)
    assert not canary.exists()


def test_objects_in_shards_are_refused(saved: tuple[Path, Any], tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"rng": BytesStorageMetadata()})))
    with pytest.raises(CheckpointError):
        safe.check_metadata(tmp_path)


def make(parent: Path, stage: str, index: int, step: int) -> Path:
    """A published checkpoint without tensors."""
    writing = parent / f"{folder.WRITING}x"
    writing.mkdir(parents=True)
    state = {"format": folder.FORMAT, "stage": stage, "stage_index": index, "step": step}
    folder.write_json(writing / folder.STATE, state)
    (writing / "weights").write_bytes(bytes(range(200)))
    final = parent / folder.checkpoint_name(stage, step)
    folder.publish(writing, final, folder.describe_files(writing, [folder.STATE, "weights"]))
    return final


def test_newest_is_by_progress_across_branches(tmp_path: Path) -> None:
    make(tmp_path, "decay", 3, 146)
    newest = make(tmp_path, "long", 5, 140)
    found = folder.choose_newest(tmp_path)
    assert found is not None and found.path == newest


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    good, bad = make(tmp_path, "one", 0, 2), make(tmp_path, "one", 0, 4)
    weights = bad / "weights"
    content = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(content[:-1])
    elif damage == "flip":
        content[77] ^= 1
        weights.write_bytes(content)
    else:
        weights.unlink()
    said: list[str] = []
    found = folder.choose_newest(tmp_path, said.append)
    assert found is not None and found.path == good
    assert len(said) == 1 and str(weights) in said[0]


def test_never_from_zero_when_all_are_damaged(tmp_path: Path) -> None:
    (make(tmp_path, "one", 0, 2) / "weights").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        folder.choose_newest(tmp_path, lambda _: None)


def test_an_unfinished_save_is_never_chosen(tmp_path: Path) -> None:
    assert folder.choose_newest(tmp_path) is None
    unfinished = make(tmp_path, "one", 0, 2)
    (unfinished / folder.COMPLETE).unlink()
    assert folder.choose_newest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no complete\.json"):
        folder.read_checkpoint(unfinished)


def test_prune_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    paths = [make(tmp_path, "one", 0, step) for step in (2, 4, 6, 8)]
    removed = folder.prune(tmp_path, keep_last=2, keep={"one-00000002"})
    assert removed == [paths[1]]
    assert [c.step for c in folder.list_checkpoints(tmp_path)] == [2, 6, 8]


def test_complete_json_is_readable(saved: tuple[Path, Any]) -> None:
    files = json.loads((saved[0] / folder.COMPLETE).read_text())["files"]
    assert {"state.json", ".metadata", "common.pt"} <= set(files)
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in files.values())


def test_an_unreadable_state_is_passed_over_and_never_means_from_zero(tmp_path: Path) -> None:
    good, bad = make(tmp_path, "one", 0, 2), make(tmp_path, "one", 0, 4)
    (bad / folder.STATE).write_text("")
    found = folder.choose_newest(tmp_path, lambda _: None)
    assert found is not None and found.path == good
    (good / folder.STATE).write_text("")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        folder.choose_newest(tmp_path, lambda _: None)


def test_an_unreadable_complete_json_is_passed_over(tmp_path: Path) -> None:
    good, bad = make(tmp_path, "one", 0, 2), make(tmp_path, "one", 0, 4)
    (bad / folder.COMPLETE).write_text("{")
    found = folder.choose_newest(tmp_path, lambda _: None)
    assert found is not None and found.path == good


def test_damaged_checkpoints_do_not_push_out_the_good_ones_that_follow(tmp_path: Path) -> None:
    make(tmp_path, "one", 0, 2)
    for step in (4, 6):
        (make(tmp_path, "one", 0, step) / "weights").unlink()
    assert folder.choose_newest(tmp_path, lambda _: None) is not None
    newest = make(tmp_path, "one", 0, 3)
    folder.prune(tmp_path, keep_last=2, keep=set())
    found = folder.choose_newest(tmp_path, lambda _: None)
    assert found is not None and found.path == newest


def test_a_kill_while_removing_leaves_what_is_cleared_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, "one", 0, 2)
    with monkeypatch.context() as killed:
        killed.setattr(folder.shutil, "rmtree", lambda *_, **__: None)
        folder.discard(path)
    assert not folder.list_checkpoints(tmp_path) and list(tmp_path.iterdir())
    folder.remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())
