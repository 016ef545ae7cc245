"""Distributed checkpoints: bit-equal on the same layout, right on others, whole or absent, never executed."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint import folder, safe, store
from megatron_smol.errors import CheckpointError, DiskError
from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import Layout

DP2 = Layout(2)
TP2 = Layout(2, {"tp": 2, "sequence_parallel": True})
PP2 = Layout(2, {"pp": 2})
VPP2 = Layout(2, {"pp": 2, "vpp": 2})
CP2 = Layout(2, {"cp": 2})
TP2_PP2 = Layout(4, {"tp": 2, "pp": 2})
PAIRS = [
    (DP2, TP2),
    (TP2, DP2),
    (TP2, PP2),
    (PP2, TP2),
    (VPP2, TP2),
    (TP2, VPP2),
    (CP2, DP2),
    (DP2, CP2),
    (Layout(4), TP2_PP2),
    (TP2_PP2, Layout(4)),
    (Layout(1), Layout(4, {"pp": 4})),
    (Layout(4, {"pp": 4}), Layout(1)),
    (Layout(4, {"cp": 2}), Layout(4, {"tp": 2, "cp": 2, "cp_comm": "all_gather"})),
    (Layout(2, {"distributed_optimizer": False}), Layout(2, {"tp": 2, "distributed_optimizer": False})),
]


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], tuple[Path, Any]]:
    """A checkpoint of step 3 written by a layout, and the curve of the run that went on."""

    @cache
    def save(layout: Layout) -> tuple[Path, Any]:
        path = tmp_path_factory.mktemp("saved") / "one-00000003"
        return path, run_ranks(ranks.save_and_go_on, layout.ranks, str(path), layout)[0]

    return save


@pytest.fixture(scope="module")
def saved(saved_by: Callable[[Layout], tuple[Path, Any]]) -> tuple[Path, Any]:
    return saved_by(DP2)


def test_same_layout_goes_on_bit_equal(saved: tuple[Path, Any]) -> None:
    path, expected = saved
    assert run_ranks(ranks.load_and_go_on, 2, str(path), DP2)[0] == expected


@pytest.mark.parametrize(
    ("before", "after"), PAIRS, ids=[f"{before.name} to {after.name}" for before, after in PAIRS]
)
def test_another_layout_loads_bit_equal_and_goes_on(
    saved_by: Callable[[Layout], tuple[Path, Any]], tmp_path: Path, before: Layout, after: Layout
) -> None:
    """All tensors, optimizer states too, are the same when saved again; training differs by rounding."""
    path, expected = saved_by(before)
    again = tmp_path / "again" / "one-00000003"
    found = run_ranks(ranks.load_and_go_on, after.ranks, str(path), after, str(again))[0]
    stored = ranks.stored_tensors(path)
    assert ranks.stored_tensors(again) == stored
    assert sum("exp_avg_sq" in name for name in stored) > 0
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert (loss, norm) == pytest.approx((expected_loss, expected_norm), rel=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize(
    "before", [Layout(1), Layout(2, {"tp": 2}), PP2, DP2, Layout(3)], ids=["one", "tp2", "pp2", "dp2", "dp3"]
)
def test_each_layout_loads_each_other(tmp_path: Path, before: Layout) -> None:
    """Twenty pairs: all tensors bit-equal, and the loss of ten steps to rounding (of three ranks, which cannot share this
    batch evenly, tests/slurm/test_fault_state.py compares it)."""
    path = tmp_path / "one-00000003"
    expected = run_ranks(ranks.save_and_go_on, before.ranks, str(path), before, 13)[0]
    stored, worst = ranks.stored_tensors(path), 0.0
    for after in (Layout(1), Layout(2, {"tp": 2}), PP2, DP2, Layout(3)):
        if after == before and after.parallel == before.parallel:
            continue
        again = tmp_path / after.name / "one-00000003"
        found = run_ranks(ranks.load_and_go_on, after.ranks, str(path), after, str(again), "fp32", 13)[0]
        assert ranks.stored_tensors(again) == stored
        even = 3 not in (before.ranks, after.ranks)
        for (loss, _), (expected_loss, _) in zip(found, expected, strict=True) if even else ():
            worst = max(worst, abs(loss / expected_loss - 1))
    print(f"\n{before.name}: loss of ten steps within {worst:.1e}")
    assert worst < 1e-5


def test_a_rank_reads_its_part_of_the_optimizer() -> None:
    """And of a parameter that two share each reads the whole. (megatron-core's own way: every rank reads everything.)"""
    found = run_ranks(ranks.what_is_read, 4, Layout(4))
    _, together, whole = found[0]
    assert max(mine for mine, _, _ in found) < 0.6 * whole and whole <= together < 2 * whole, found


def test_precision_may_change(saved: tuple[Path, Any]) -> None:
    path, expected = saved
    found = run_ranks(ranks.load_and_go_on, 2, str(path), DP2, None, "bf16")[0]
    for (loss, _), (expected_loss, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-2)


def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing(tmp_path: Path) -> None:
    for message, left in run_ranks(ranks.save_fails, 2, str(tmp_path / "one-00000003")):
        assert "No space left on device" in message
        assert left == []


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


def test_one_bit_of_complete_json(tmp_path: Path) -> None:
    """Whatever it makes of the list: one sentence, or the flip changed nothing that counts."""
    complete = make(tmp_path, "one", 0, 2) / folder.COMPLETE
    content = complete.read_bytes()
    passed = []
    for at, bit in itertools.product(range(len(content)), range(8)):
        complete.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            folder.verify_files(complete.parent)
        except CheckpointError:
            continue
        passed.append(at)
    unread = content.index(b'"format": 2')
    counts = [at for at in passed if not content[at : at + 1].isspace() and not unread <= at < unread + 11]
    assert not counts, [content[at - 9 : at + 9] for at in counts]


def test_one_bit_of_state_json(tmp_path: Path) -> None:
    good, bad = make(tmp_path, "one", 0, 2), make(tmp_path, "one", 0, 4)
    content = (bad / folder.STATE).read_bytes()
    for at, bit in itertools.product(range(len(content)), range(8)):
        (bad / folder.STATE).write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        folder.list_checkpoints(tmp_path)
        found = folder.choose_newest(tmp_path, lambda _: None)
        assert found is not None and found.path == good, (at, bit)
        if not bad.exists():  # it is, when the flip made its step a smaller one: then nobody asked for it
            (tmp_path / f"{folder.DAMAGED}{bad.name}").rename(bad)


def test_one_of_a_later_version_is_not_taken_for_damaged(tmp_path: Path) -> None:
    """Whatever it calls its fields: nothing is moved, and nobody goes on from before it."""
    make(tmp_path, "one", 0, 2)
    path = make(tmp_path, "one", 0, 4)
    folder.write_json(path / folder.STATE, {"format": 9, "phase": 1})
    folder.write_json(path / folder.COMPLETE, {"format": 9, "parts": []})
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"has format 9, .* move that checkpoint away"):
        folder.choose_newest(tmp_path, said.append)
    assert path.exists() and not said


def test_one_moved_aside_that_is_whole_comes_back(tmp_path: Path) -> None:
    """Its disk did not answer when it was looked at; it is not thrown away when another is found damaged."""
    for step in (2, 4, 8):
        make(tmp_path, "one", 0, step)
    whole = tmp_path / folder.checkpoint_name("one", 8)
    whole.rename(whole.with_name(f"{folder.DAMAGED}{whole.name}"))
    (tmp_path / folder.checkpoint_name("one", 4) / "weights").unlink()
    found = folder.choose_newest(tmp_path, lambda _: None)
    assert found is not None and found.path == whole


def test_a_link_to_nowhere_is_not_an_empty_folder(tmp_path: Path) -> None:
    link = tmp_path / "checkpoints"
    assert folder.choose_newest(link) is None
    link.symlink_to(tmp_path / "not mounted")
    with pytest.raises(DiskError, match="link to nowhere"):
        folder.choose_newest(link)


def test_of_damaged_ones_the_last_found_stay(tmp_path: Path) -> None:
    """For a person to look at; a disk that goes bad does not fill up with them."""
    for step in (2, 4, 6, 8):
        make(tmp_path, "one", 0, step)
    for step, left in ((8, {8}), (6, {6})):
        (tmp_path / folder.checkpoint_name("one", step) / "weights").unlink()
        folder.choose_newest(tmp_path, lambda _: None)
        assert {int(path.name[-8:]) for path in tmp_path.glob(f"{folder.DAMAGED}*")} == left
    folder.choose_newest(tmp_path, lambda _: None)
    assert len(list(tmp_path.glob(f"{folder.DAMAGED}*"))) == 1


def test_who_thaws_while_it_publishes_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between putting the old one away and renaming its own, which a later start has removed."""
    published = make(tmp_path, "one", 0, 2)
    content, real = (published / "weights").read_bytes(), Path.rename

    def rename(self: Path, target: Path) -> Path:
        done = real(self, target)
        if self == published:
            folder.shutil.rmtree(tmp_path / f"{folder.WRITING}x")
        return done

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(FileNotFoundError):
        make(tmp_path, "one", 0, 2)
    found = folder.choose_newest(tmp_path)
    assert found is not None and (found.path / "weights").read_bytes() == content


def test_a_bad_sector_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = make(tmp_path, "one", 0, 2), make(tmp_path, "one", 0, 4)
    real = Path.open

    def unreadable(self: Path, *arguments: Any, **named: Any) -> Any:
        if self == bad / "weights":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", unreadable)
    said: list[str] = []
    found = folder.choose_newest(tmp_path, said.append)
    assert found is not None and found.path == good
    assert len(said) == 1 and f"{bad / 'weights'} cannot be read (Input/output error)" in said[0]


def test_checkpoints_of_format_1_are_read(tmp_path: Path) -> None:
    """They had SHA-256."""
    path = make(tmp_path, "one", 0, 2)
    folder.write_json(path / folder.STATE, json.loads((path / folder.STATE).read_text()) | {"format": 1})
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in (folder.STATE, "weights")
    }  # fmt: skip
    folder.write_json(path / folder.COMPLETE, {"format": 1, "files": files})
    found = folder.choose_newest(tmp_path)
    assert found is not None and found.path == path
    (path / "weights").write_bytes(bytes(200))
    with pytest.raises(CheckpointError, match=r"weights does not have the checksum .*sha256"):
        folder.verify_files(path)


def test_never_from_zero_when_all_are_damaged(tmp_path: Path) -> None:
    (make(tmp_path, "one", 0, 2) / "weights").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        folder.choose_newest(tmp_path, lambda _: None)


def test_an_unfinished_save_is_never_chosen(tmp_path: Path) -> None:
    assert folder.choose_newest(tmp_path) is None
    published = make(tmp_path, "one", 0, 2)
    (published / folder.COMPLETE).unlink()
    unfinished = published.rename(tmp_path / f"{folder.WRITING}one-00000002-1234abcd")
    assert folder.choose_newest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no complete\.json"):
        folder.read_checkpoint(unfinished)


def test_prune_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    paths = [make(tmp_path, "one", 0, step) for step in (2, 4, 6, 8)]
    removed = folder.prune(tmp_path, keep_last=2, keeps=lambda checkpoint: checkpoint.step == 2)
    assert removed == [paths[1]]
    assert [c.step for c in folder.list_checkpoints(tmp_path)] == [2, 6, 8]


def test_complete_json_is_readable(saved: tuple[Path, Any]) -> None:
    files = json.loads((saved[0] / folder.COMPLETE).read_text())["files"]
    assert {"state.json", ".metadata", "common.pt"} <= set(files)
    assert all(len(entry[folder.CHECKSUM]) == 32 and entry["bytes"] > 0 for entry in files.values())


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
    folder.prune(tmp_path, keep_last=2, keeps=lambda _: False)
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


def test_a_replicated_optimizer_is_not_taken_for_a_sharded_one(tmp_path: Path) -> None:
    checkpoint = folder.Checkpoint(tmp_path, {"layout": {"distributed_optimizer": False}})
    with pytest.raises(CheckpointError, match=r"distributed_optimizer false, the recipe says true"):
        store._require_form(checkpoint, True)
    store._require_form(checkpoint, False)
    store._require_form(folder.Checkpoint(tmp_path, {}), True)
