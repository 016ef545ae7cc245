"""tools/convert_checkpoint.py: both directions, and its words for what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.shapes import save_checkpoint, small_model
from tests.data.conftest import tokenizer_folder  # noqa: F401
from tools import convert_checkpoint


def test_both_directions(tokenizer_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    save_checkpoint(tmp_path / "a", small_model(), tokenizer_folder)
    steps = (("hf", "a", "b"), ("megatron", "b", "c"), ("hf", "c", "d"))
    for target, source, result in steps:
        directories = ["--load-dir", str(tmp_path / source), "--save-dir", str(tmp_path / result)]
        assert convert_checkpoint.main(["--to", target, *directories]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "bd")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_errors_are_one_sentence_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directories = ["--load-dir", str(tmp_path / "gone"), "--save-dir", str(tmp_path / "out")]
    assert convert_checkpoint.main(["--to", "hf", *directories]) == 4
    assert capsys.readouterr().err.startswith("error: no checkpoint at")
    assert convert_checkpoint.main(["--to", "megatron", *directories]) == 2
    assert convert_checkpoint.main(["--to", "megatron", *directories, "--target-params-dtype", "bf16"]) == 2
    assert "goes with --to hf" in capsys.readouterr().err
