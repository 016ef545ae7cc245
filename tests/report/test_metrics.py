"""metrics.jsonl as columns: the same rows however they are read, while the file grows and when it is cut back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smol.errors import DataError
from megatron_smol.report import metrics
from megatron_smol.report.metrics import MetricsFile


def row(step: int, stage: str = "a", **more: Any) -> dict[str, Any]:
    base = {"stage": stage, "step": step, "tokens": 10 * step, "loss": 2.0 / step, "lr": 1e-3}
    rest = {"grad_norm": 1.0, "seconds": 0.5, "tokens_per_s": 20.0}
    return base | rest | {"drawn": {"web": 2, "math": 1} if step % 2 else {"web": 3}} | more


def text(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


@pytest.mark.parametrize("block", [100, 1000, 1 << 20])
def test_rows_are_the_same_in_blocks_of_any_size(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_BYTES", block)
    path = tmp_path / "metrics.jsonl"
    path.write_text(text([*(row(s) for s in range(1, 31)), *(row(s, "b") for s in range(21, 26))]))
    found = MetricsFile(path).read()
    assert found["a"].step.tolist() == list(range(1, 31))
    assert found["a"].loss.tolist() == [2.0 / s for s in range(1, 31)]
    assert found["a"].windows() == {"web": 75, "math": 15}
    assert found["a"].windows(until_step=3) == {"web": 7, "math": 2}
    assert found["b"].tokens.tolist() == [210, 220, 230, 240, 250]
    assert found["b"].windows(until_step=20) == {"web": 0, "math": 0}


def test_only_what_is_new_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsFile(path)
    assert reader.read() == {}
    rows, half = [row(s) for s in range(1, 10)], json.dumps(row(10))
    path.write_text(text(rows) + half[:20])
    assert len(reader.read()["a"]) == 9
    path.write_text(text([row(1, loss=7.0), *rows[1:]]) + half + "\n")  # the first row was read before
    assert reader.read()["a"].loss.tolist() == [2.0 / s for s in range(1, 11)]


def test_a_file_that_was_cut_back_is_read_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsFile(path)
    path.write_text(text([row(s) for s in range(1, 10)]))
    reader.read()
    again = [
        *(row(s) for s in range(1, 5)),
        *(row(s, loss=9.0) for s in range(5, 15)),
    ]  # and longer than before
    path.write_text(text(again))
    assert reader.read()["a"].loss.tolist() == [one["loss"] for one in again]


def test_a_step_that_was_not_applied_may_have_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text([row(1), row(2, loss=float("nan"), applied=False), row(3)]))
    series = MetricsFile(path).read()["a"]
    assert np.isnan(series.loss).tolist() == [False, True, False]
    assert series.applied.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("line", "why"),
    [('{"stage": "a", "st', "Unterminated"), ('{"stage": "a"}', "it has no 'step'"), ("7", "not iterable")],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text([row(1), row(2)]) + line + "\n" + text([row(4)]))
    with pytest.raises(DataError, match=rf"metrics\.jsonl line 3 is damaged.*{why}"):
        MetricsFile(path).read()
