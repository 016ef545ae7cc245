"""Samples of an exported model: the same seed, the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_smol import cli
from megatron_smol.checkpoint.convert import to_hf
from megatron_smol.errors import CheckpointError
from megatron_smol.post.generate import generate_samples
from tests.checkpoint.shapes import save_checkpoint, small_model
from tests.data.conftest import tokenizer_folder  # noqa: F401


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("generate")
    save_checkpoint(folder / "a", small_model(), tokenizer_folder)
    to_hf(folder / "a", folder / "hf", say=lambda _: None)
    return folder / "hf"


def test_the_seed_decides(exported: Path) -> None:
    prompts = ["The plan of", "def f(x):", ""]
    first = generate_samples(exported, prompts, max_new_tokens=8, temperature=1.0, seed=3)
    assert [sample["prompt"] for sample in first] == prompts
    assert first == generate_samples(exported, prompts, max_new_tokens=8, temperature=1.0, seed=3)
    assert first != generate_samples(exported, prompts, max_new_tokens=8, temperature=1.0, seed=4)
    greedy = generate_samples(exported, prompts, max_new_tokens=8, temperature=0.0, seed=3)
    assert greedy == generate_samples(exported, prompts, max_new_tokens=8, temperature=0.0, seed=4)


def test_the_command_prints_and_writes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "samples.json"
    arguments = ["generate", exported, "A [bold]prompt", "--max-new-tokens", 4, "--json", out]
    monkeypatch.setattr("sys.argv", ["smol", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    (row,) = json.loads(out.read_text())
    assert row["prompt"] == "A [bold]prompt" and row["model"] == str(exported)
    assert "A [bold]prompt" in capsys.readouterr().out


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json, .* make one with `smol convert to-hf"):
        generate_samples(tmp_path, ["x"])
