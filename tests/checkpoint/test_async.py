"""A save beside training: the same bits as one that training waits for, published whole, failures told to every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_smol.checkpoint import folder
from tests import ranks
from tests.checkpoint import saving_ranks
from tests.checkpoint.test_store import make
from tests.helpers import run_ranks
from tests.layouts import Layout
from tests.tiny import TinyRun

LAYOUTS = [
    (Layout(1), "bf16", None),
    (Layout(2), "fp32", None),
    (Layout(2, {"pp": 2}), "bf16", None),
    (Layout(2, {"distributed_optimizer": False}), "bf16", None),
    # Several buckets, whose ends are padded, and weights that arrive during the next step.
    (Layout(2, {"overlap": True}), "bf16", 5000),
    (Layout(4, {"tp": 2}), "fp32", None),
]


@pytest.mark.parametrize(
    ("layout", "precision", "bucket"), LAYOUTS, ids=[f"{one.name}, {name}" for one, name, _ in LAYOUTS]
)
def test_training_goes_on_and_the_checkpoint_is_of_the_moment_asked_for(
    tmp_path: Path, layout: Layout, precision: str, bucket: int | None
) -> None:
    found = run_ranks(saving_ranks.beside_training, layout.ranks, str(tmp_path), layout, precision, bucket)
    assert all(curve == undisturbed for curve, undisturbed in found)
    assert ranks.stored_tensors(tmp_path / "beside") == ranks.stored_tensors(tmp_path / "waited")
    folder.verify_files(tmp_path / "beside")
    assert {path.name for path in tmp_path.iterdir()} == {"one-00000002", "waited", "beside"}
    _optimizer_agrees_with_the_weights(tmp_path / "beside")


def _optimizer_agrees_with_the_weights(path: Path) -> None:
    """The optimizer's fp32 copy of a weight, rounded, is the weight: all buckets and shards lie where they belong."""
    stored = ranks.stored_tensors_whole(path)
    pairs = 0
    for name, weight in stored.items():
        for kind in ("param", "fp32_param"):
            copy = stored.get(f"optimizer.state.{kind}.{name}")
            if copy is not None:
                assert torch.equal(copy.to(weight.dtype), weight), name
                pairs += 1
    assert pairs >= 8


def test_nothing_is_published_until_every_rank_is_done(tmp_path: Path) -> None:
    for said in run_ranks(saving_ranks.slow_rank, 2, str(tmp_path)):
        assert said == [False, False, False, False, True]


@pytest.mark.parametrize("what", ["writing", "publishing"])
def test_a_failure_in_the_background_reaches_all_ranks_and_spares_what_was_there(
    tmp_path: Path, what: str
) -> None:
    for message, left, went_on in run_ranks(saving_ranks.failing, 2, str(tmp_path), what):
        assert "one-00000003 failed on rank 0" in message and "No space left on device" in message
        assert "earlier checkpoints are intact" in message
        assert left == ["one-00000001"] and went_on
    assert folder.choose_newest(tmp_path) is not None


@pytest.mark.parametrize("killed", ["before", "between", "after"])
def test_a_kill_while_one_checkpoint_replaces_another_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    class Kill(BaseException):
        pass

    old = make(tmp_path, "one", 0, 2)
    (old / "mark").touch()
    rename = Path.rename
    renamed: list[str] = []

    def rename_or_die(self: Path, target: Path) -> Path:
        if killed == ("before", "between", "after")[len(renamed)]:
            raise Kill
        renamed.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_or_die)
    with pytest.raises(Kill):
        make(tmp_path, "one", 0, 2)
    monkeypatch.undo()
    folder.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one-00000002"]
    assert (tmp_path / "one-00000002" / "mark").exists() == (killed != "after")
    assert folder.choose_newest(tmp_path) is not None


def test_a_run_saves_beside_training_what_it_would_save_waiting(tiny: TinyRun) -> None:
    assert tiny.train("save.keep_every=1024").returncode == 0
    waiting = tiny.folder / "waiting"
    overrides = ("save.keep_every=1024", "save.asynchronous=false", f"run_dir={waiting}")
    assert tiny.train(*overrides).returncode == 0
    beside, waited = (folder.list_checkpoints(run / "checkpoints") for run in (tiny.run, waiting))
    names = [one.path.name for one in beside]
    assert names == [one.path.name for one in waited]
    assert {"one-00000004", "two-00000008"} < set(names), "one for every 1,024 tokens stays"
    for one, other in zip(beside, waited, strict=True):
        assert ranks.stored_tensors(one.path) == ranks.stored_tensors(other.path)
        assert one.state["ledger"] == other.state["ledger"] and one.state["hooks"] == other.state["hooks"]
    log = (tiny.run / "log.txt").read_text()
    requested = log.count("copied in")
    assert requested == log.count(" saved ") > 6, "asked for and durable are two lines"
    assert "copied in" not in (waiting / "log.txt").read_text()
