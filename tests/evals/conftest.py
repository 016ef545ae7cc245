"""A random Llama model with a chat template, and a few questions with known answers in the hub's columns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.data.conftest import tokenizer_folder  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

CONTEXT = 192
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("plan", "run", "steps", "tokens", "count", "def encode", "return", "value", "string", "it starts")


def arc_rows(count: int = 6) -> list[dict[str, Any]]:
    """ARC's columns; the gold goes round, and question 2 has labels 1 to 4 as some of ARC's do."""
    rows = []
    for index in range(count):
        texts = [WORDS[(index + k) % len(WORDS)] + "." * k for k in range(4)]
        labels = list("1234" if index == 2 else "ABCD")
        question = f"Which {WORDS[index % len(WORDS)]} is made before {index} tokens?"
        rows.append(
            {
                "question": question,
                "choices": {"text": texts, "label": labels},
                "answerKey": labels[index % 4],
            }
        )
    return rows


def piqa_rows(count: int = 4) -> list[dict[str, Any]]:
    return [
        {"goal": f"make {WORDS[i]}", "sol1": "count twice", "sol2": "return it", "label": i % 2}
        for i in range(count)
    ]


def gsm8k_rows(count: int = 8) -> list[dict[str, Any]]:
    return [{"question": f"{i} and 1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_model(folder: Path, tokenizer: Path, seed: int, chat: bool = True) -> Path:
    """A Hugging Face folder whose answers differ from question to question."""
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=640, max_position_embeddings=CONTEXT, initializer_range=0.15, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if chat:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:  # noqa: F811
    return random_model(tmp_path_factory.mktemp("models") / "first", tokenizer_folder, seed=1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:  # noqa: F811
    return random_model(tmp_path_factory.mktemp("others") / "second", tokenizer_folder, seed=2, chat=False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval-data")
    write_rows(folder / "arc_easy" / "test.jsonl", arc_rows())
    write_rows(folder / "piqa" / "validation.jsonl", piqa_rows())
    write_rows(folder / "smollm2_gsm8k" / "train.jsonl", gsm8k_rows())
    write_rows(folder / "smollm2_gsm8k" / "test.jsonl", gsm8k_rows(3))
    return folder
