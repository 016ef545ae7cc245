"""Metrics files after a kill: cut back to the checkpoint, whatever their size, and never a step twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_smol.recipe.flops import flops_per_token
from megatron_smol.recipe.load import load_recipe
from megatron_smol.train import monitor
from megatron_smol.train.monitor import cut_back
from tests.recipe.recipes import EXAMPLES


def write(path: Path, *places: tuple[int, int], torn: str = "") -> Path:
    path.write_text("".join(json.dumps({"stage_index": s, "step": n}) + "\n" for s, n in places) + torn)
    return path


def places(path: Path) -> list[tuple[int, int]]:
    return [(row["stage_index"], row["step"]) for row in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize("tail_bytes", [1, 40, 100, 1 << 20])
def test_rows_beyond_the_checkpoint_go(tmp_path: Path, tail_bytes: int) -> None:
    rows = [(0, step) for step in range(1, 30)] + [(1, step) for step in range(20, 40)]
    path = write(tmp_path / "m.jsonl", *rows, torn='{"stage_index": 1, "st')
    cut_back(path, (1, 25), tail_bytes)
    assert places(path) == [row for row in rows if row <= (1, 25)]


def test_a_torn_last_row_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", (0, 1), (0, 2), torn='{"stage_index": 0')
    cut_back(path, (0, 9))
    assert places(path) == [(0, 1), (0, 2)]


def test_zeros_that_a_power_cut_left_go(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", (0, 1), (0, 2), torn="\0" * 50 + '"step": 3}\n' + "\0" * 9)
    cut_back(path, (0, 9))
    assert places(path) == [(0, 1), (0, 2)]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", (0, 0), (0, 1))
    cut_back(path, (0, 0))
    assert path.read_text() == ""
    cut_back(tmp_path / "missing.jsonl", (0, 0))


@pytest.mark.parametrize(
    ("gpu", "says"),
    [("NVIDIA L40S", " | MFU 50.0%"), ("NVIDIA H100 80GB HBM3", " | MFU 18.3%"), ("GeForce", "")],
)
def test_mfu_is_against_the_peak_that_the_plan_knows(
    monkeypatch: pytest.MonkeyPatch, gpu: str, says: str
) -> None:
    recipe = load_recipe(EXAMPLES / "demo.yaml")
    monkeypatch.setattr(monitor, "backend", lambda: SimpleNamespace(on_gpu=True, device=0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: gpu)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    speed = 362e12 / flops_per_token(recipe.model, 64)  # of one L40S at its peak, by two
    trainer: Any = SimpleNamespace(plan=SimpleNamespace(recipe=recipe))
    done: Any = SimpleNamespace(stage=SimpleNamespace(seq_length=64), tokens_per_second=speed)
    assert monitor._mfu(trainer, done) == says
