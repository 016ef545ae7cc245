"""Disks that fail under a save, on one rank only or for all: the same answer on every rank, soon, and nothing lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint import disk_ranks
from tests.helpers import run_ranks

BEFORE = ["one-00000002"]
MOUNTING = ("read-only", "another disk in its place")
TOLD = {
    "EIO in a write": "Input/output error",
    "ENOSPC late": "No space left on device",
    "EIO in fsync": "Input/output error",
    "size limit": "limits the size of files",
    "read-only": "Read-only file system",
    "another disk in its place": "No such file or directory",
}
SECONDS = 30


def may_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


def test_what_fails_on_one_rank_is_the_same_error_on_all(tmp_path: Path) -> None:
    """And the save after it, of the same step, is whole: nothing of the failed one is in its way."""
    cases = [case for case in disk_ranks.CASES if case not in MOUNTING or may_mount()]
    of_rank_0, of_rank_1 = run_ranks(disk_ranks.each, 2, str(tmp_path), cases)
    for case, (said, seconds, left), (said_1, seconds_1, _) in zip(cases, of_rank_0, of_rank_1, strict=True):
        print(f"{case}: {max(seconds, seconds_1):.1f} s: {said}")
        assert said == said_1 and max(seconds, seconds_1) < SECONDS, case
        if case == "slow":
            assert said == "" and left == [*BEFORE, "one-00000004"], "slow is not broken"
        else:
            assert TOLD[case] in said and "earlier checkpoints are intact" in said, (case, said)
            # Only a file that lies elsewhere is missed by another rank than the one that wrote it, if that looks first.
            ranks = ("rank 0", "rank 1") if case == "another disk in its place" else ("rank 1",)
            assert any(f"one-00000004 failed on {rank} (" in said for rank in ranks), (case, said)
            assert left == BEFORE, (case, left)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if not may_mount():
        pytest.skip("needs root, to mount a file system of 8 MB")
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=200", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", "--lazy", where], check=True)


def test_a_full_disk_predicted_or_not(small_disk: Path) -> None:
    """Room for 10, 50 and 90 % of a checkpoint, then for too few files."""
    parts = [0.1, 0.5, 0.9]
    found = run_ranks(disk_ranks.on_a_full_disk, 2, str(small_disk), parts, 3)
    assert found[0] == found[1]
    for predicted, late, left in found[0][:-1]:
        print(predicted, "|", late)
        assert f"{small_disk} has " in predicted and "MB free and a checkpoint needs up to" in predicted
        assert "saving" in late and "MB are free there, a checkpoint needs up to" in late
        assert left == BEFORE
    no_files, _, left = found[0][-1]
    assert f"{small_disk} has room for 3 more files (inodes) and a checkpoint needs up to 8" in no_files
    assert left == BEFORE
