"""The command with Megatron's argument names against Megatron's own way of writing the same documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import models, pre_tokenizers, trainers

from megatron_smol.data.source import load_source

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
TEXTS = [f"Chapter {number}. It's 10% longer;\n\n  été 東京" * (1 + number % 4) for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def megatrons_way(prefix: Path, folder: Path, texts: list[str]) -> None:
    """The loop of Megatron's tools/preprocess_data.py: a document at a time, EOD at its end."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for text in texts:
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("<|endoftext|>")]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def test_a_megatron_command_line_writes_megatrons_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    records = [{"text": text, "title": text[:9]} for text in TEXTS]
    (tmp_path / "in.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run(
        *("--input", tmp_path / "in.json", "--output-prefix", tmp_path / "ours"),
        *("--json-keys", "text", "title", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", tokenizer_folder, "--append-eod", "--workers", "1", "--partitions", "1"),
        *("--log-interval", "20", "--keep-sequential-samples"),
    )
    assert done.returncode == 0, done.stderr
    assert "tokenized 50 documents" in done.stderr and "ours: " in done.stderr
    for key, texts in (("text", TEXTS), ("title", [text[:9] for text in TEXTS])):
        megatrons_way(tmp_path / "theirs", tokenizer_folder, texts)
        for end in (".bin", ".idx"):
            ours = tmp_path / f"ours_{key}_document{end}"
            assert ours.read_bytes() == (tmp_path / f"theirs{end}").read_bytes(), ours.name
    assert load_source(tmp_path / "ours_text_document").name == "ours"
    assert "document 50: " in (tmp_path / "ours_text_document.card.html").read_text()
    assert not list(tmp_path.glob(".*"))


def test_errors_are_one_sentence_with_an_exit_code(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": oops}\n')
    common = ["--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizer_folder, "--workers", "1"]
    cases: list[tuple[list[str | Path], int, str]] = [
        (
            ["--input", tmp_path / "in.jsonl", "--tokenizer-type", "GPT2BPETokenizer"],
            2,
            "allowed: HuggingFaceTokenizer",
        ),
        (["--input", tmp_path / "no.jsonl"], 2, "no input at"),
        (["--input", tmp_path / "in.jsonl"], 3, "in.jsonl line 2: not one JSON object"),
        (["--input", tmp_path / "in.jsonl", "--workers", "0"], 2, "--workers must be at least 1"),
    ]
    for arguments, code, message in cases:
        done = run(*common, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_help_teaches() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("examples:", "--append-eod", "hub name", "continues where it stopped"):
        assert word in done.stdout
