"""The SmolLM2 tokenizer out of a GGUF file, as a Hugging Face folder that gives the published ids.

Stands before everything else in the demo: tools/make_demo_data.py calls it once, and preprocessing, training,
export and chat all load the folder it writes. A GGUF stores the vocabulary, the merges and the chat template,
but names its pre-tokenizer only by a word ("smollm"). Libraries that rebuild the tokenizer from it fall back
to GPT-2's splitter and lose SmolLM2's rule that every digit is a token of its own, which changes the ids of
about one document in six. So the splitter is set here, in one place, and checked before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_smol.errors import DataError, UserError

# Roles of the ids are part of the recipe: 0 ends a document in pretraining, 1 and 2 frame a turn of a chat.
EXPECTED_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
VOCABULARY_SIZE = 49_152
CONTEXT_LENGTH = 8_192
GGUF_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
# Of the base models: `<|endoftext|>` begins and ends a text.
BASE_ROLES = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
}
# What the header calls them. An instruct model's turns begin with bos and end with eos.
_STORED_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class GgufVocabulary:
    """A GGUF file's byte-level BPE: tokens by id, merges by rank, special tokens, chat template, stored roles."""

    tokens: list[str]
    merges: list[tuple[str, str]]
    special_tokens: list[str]
    chat_template: str
    roles: Mapping[str, str] = field(default_factory=dict)


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

    try:
        fields = GGUFReader(gguf_path).fields
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{gguf_path} cannot be read as a GGUF file ({error}); fetch it again") from error
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
        roles={
            role: tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()]
            for role, name in _STORED_ROLES.items()
            if f"tokenizer.ggml.{name}_token_id" in fields
        },
    )


def _split_merge(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def build_tokenizer(vocabulary: GgufVocabulary) -> Tokenizer:
    """A `tokenizers.Tokenizer` with the vocabulary's ids, SmolLM2's splitter and no post-processor."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"the tokenizer's merges do not fit its vocabulary ({error}); fetch the file again"
        ) from error
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


def save_folder(
    tokenizer: Tokenizer, vocabulary: GgufVocabulary, folder: Path, roles: Mapping[str, str] = BASE_ROLES
) -> None:
    """Write a Hugging Face tokenizer folder whose special tokens have these roles."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
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
    _write_json(folder / "special_tokens_map.json", dict(roles))
    if vocabulary.chat_template:
        (folder / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_from_gguf(
    gguf_path: Path, folder: Path, roles: Literal["base", "stored"] = "base"
) -> Tokenizer:
    """Rebuild SmolLM2's tokenizer from `gguf_path`, check it, write it to `folder` and return it.

    roles: those of the base models (for pretraining), or the file's own (to go with the file's weights).
    """
    vocabulary = read_vocabulary(gguf_path)
    tokenizer = build_tokenizer(vocabulary)
    check_smollm2(tokenizer)
    save_folder(tokenizer, vocabulary, folder, BASE_ROLES if roles == "base" else vocabulary.roles)
    return tokenizer
