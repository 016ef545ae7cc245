"""What a file in the run folder asks for, agreed on by all ranks (signals themselves: tests/slurm/test_signals.py)."""

from __future__ import annotations

from pathlib import Path

from megatron_smol.train import signals
from megatron_smol.train.signals import ASKED_BY_FILE, StopFlag
from tests.helpers import run_ranks


def look(folder: str) -> list[tuple[int, bool]]:
    import torch

    from megatron_smol.model.backend import init_process_group

    init_process_group()
    signals.LOOK_EVERY_SECONDS = 0.0
    flag, run, seen = StopFlag(Path(folder)), Path(folder), []
    for name in ("", "save", "", "stop", "save"):
        if name and torch.distributed.get_rank() == 0:
            (run / name).touch()
        seen.append((flag.agreed(), flag.save_asked))
    return seen


def test_all_ranks_hear_of_a_file_once(tmp_path: Path) -> None:
    found = run_ranks(look, 2, str(tmp_path))
    stop = ASKED_BY_FILE
    assert found == [[(0, False), (0, True), (0, False), (stop, False), (stop, True)]] * 2
    assert (tmp_path / "stop").exists() and not (tmp_path / "save").exists()
