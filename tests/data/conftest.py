"""A small real tokenizer of SmolLM2's kind: byte-level BPE, digits split, 21 bytes without a token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_smol.data.tokenizer import Tokenizer, load_tokenizer

# SmolLM2's vocabulary has none of these: six control characters, two lead bytes, and what UTF-8 never uses.
MISSING_BYTES = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROSE = "The plan of a run is made before it starts; 128 steps of 1,024 tokens. Don't count twice!\n\n"


def byte_symbol(byte: int) -> str:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return (
        chr(byte)
        if byte in printable
        else chr(256 + [b for b in range(256) if b not in printable].index(byte))
    )


def train_tokenizer(folder: Path, vocab_size: int = 600, text: str = PROSE) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [byte_symbol(byte) for byte in range(256) if byte not in MISSING_BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    sources = [Path(__file__).read_text(), Path(json.__file__).read_text(), text]
    tokenizer.train_from_iterator(sources, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)
