"""A tiny model with a real tokenizer of SmolLM2's kind, and chat data whose answers can be learnt in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.data.conftest import train_tokenizer
from tests.post.made import TUNING, conversations, pairs, run_sft, write_rows


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of 110,000 weights as an exported Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    train_tokenizer(folder, text="".join(json.dumps(row) for row in conversations(40)) * 3)
    config = transformers.LlamaConfig(
        vocab_size=640,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(4)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("chat") / "sft.jsonl", conversations(120))


@pytest.fixture(scope="session")
def pair_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "dpo.jsonl", pairs(80))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the test's own processes run (OMP_NUM_THREADS=1): sums in the same order, so the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tuned(base: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after SFT: it answers and stops."""
    output = tmp_path_factory.mktemp("tuned") / "sft"
    assert run_sft(base, chat_rows, output, *TUNING) == 0
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
