"""The SmolLM2 tokenizer out of a GGUF file, as a Hugging Face folder that gives the published ids.

Stands before everything else in the demo: tools/make_demo_data.py calls it once, and preprocessing, training,
export and chat all load the folder it writes. A GGUF stores the vocabulary, the merges and the chat template,
but names its pre-tokenizer only by a word ("smollm"). Libraries that rebuild the tokenizer from it fall back
to GPT-2's splitter and lose SmolLM2's rule that every digit is a token of its own, which changes the ids of
about one document in six. So the splitter is set here, in one place, and checked before anything is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_smol.errors import DataError, UserError

# Roles of the ids are part of the recipe: 0 ends a document in pretraining, 1 and 2 frame a turn of a chat.
EXPECTED_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
VOCABULARY_SIZE = 49_152
CONTEXT_LENGTH = 8_192
GGUF_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


@dataclass(frozen=True)
class GgufVocabulary:
    """A GGUF file's byte-level BPE: tokens by id, merges by rank, special tokens, chat template."""

    tokens: list[str]
    merges: list[tuple[str, str]]
    special_tokens: list[str]
    chat_template: str


def smollm2_splitter() -> pre_tokenizers.PreTokenizer:
    """Every digit alone, then GPT-2's byte-level splitting: the published SmolLM2 pre-tokenizer."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def read_vocabulary(gguf_path: Path) -> GgufVocabulary:
    """Read tokens, merges, special tokens and chat template from the header of a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "reading a GGUF file needs the package gguf: pip install 'megatron-smol[demo]'"
        ) from error

    fields = GGUFReader(gguf_path).fields
    needed = ["tokens", "merges", "token_type", "model"]
    missing = [name for name in needed if f"tokenizer.ggml.{name}" not in fields]
    if missing:
        raise DataError(f"{gguf_path}: no tokenizer in this GGUF file (missing tokenizer.ggml.{missing[0]})")
    if (kind := fields["tokenizer.ggml.model"].contents()) != "gpt2":
        raise DataError(
            f"{gguf_path}: the tokenizer is of kind {kind!r}; only byte-level BPE ('gpt2') is read"
        )

    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    template = fields.get("tokenizer.chat_template")
    return GgufVocabulary(
        tokens=tokens,
        merges=[_split_merge(merge) for merge in fields["tokenizer.ggml.merges"].contents()],
        special_tokens=[t for t, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL_TOKEN],
        chat_template=template.contents() if template else "",
    )


def _split_merge(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def build_tokenizer(vocabulary: GgufVocabulary) -> Tokenizer:
    """A `tokenizers.Tokenizer` with the vocabulary's ids, SmolLM2's splitter and no post-processor."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges))
    tokenizer.pre_tokenizer = smollm2_splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in vocabulary.special_tokens]
    )
    return tokenizer


def check_smollm2(tokenizer: Tokenizer) -> None:
    """Refuse what is not SmolLM2's tokenizer: vocabulary size, roles of the first ids, digits one by one."""
    if (size := tokenizer.get_vocab_size()) != VOCABULARY_SIZE:
        raise DataError(f"the tokenizer has {size:,} tokens; SmolLM2's has {VOCABULARY_SIZE:,}")
    for token, expected in EXPECTED_IDS.items():
        if (found := tokenizer.token_to_id(token)) != expected:
            raise DataError(f"the tokenizer gives {token} the id {found}; SmolLM2's gives it {expected}")
    if (pieces := tokenizer.encode("1234").tokens) != ["1", "2", "3", "4"]:
        raise DataError(f"the tokenizer splits 1234 into {pieces}; SmolLM2's gives every digit its own token")


def save_folder(tokenizer: Tokenizer, vocabulary: GgufVocabulary, folder: Path) -> None:
    """Write a Hugging Face tokenizer folder for the base model: `<|endoftext|>` begins and ends a text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles: dict[str, Any] = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    config = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": vocabulary.special_tokens,
        "model_max_length": CONTEXT_LENGTH,
        # The generic class takes tokenizer.json as it is; GPT2Tokenizer would put GPT-2's splitter back.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", roles)
    if vocabulary.chat_template:
        (folder / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_from_gguf(gguf_path: Path, folder: Path) -> Tokenizer:
    """Rebuild SmolLM2's tokenizer from `gguf_path`, check it, write it to `folder` and return it."""
    vocabulary = read_vocabulary(gguf_path)
    tokenizer = build_tokenizer(vocabulary)
    check_smollm2(tokenizer)
    save_folder(tokenizer, vocabulary, folder)
    return tokenizer
