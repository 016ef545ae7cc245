"""The tokenizer repair on a vocabulary of a few dozen tokens: no model file and no network."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from megatron_smol.data import gguf_tokenizer
from megatron_smol.data.gguf_tokenizer import GgufVocabulary, build_tokenizer, check_smollm2, save_folder
from megatron_smol.errors import DataError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def vocabulary() -> GgufVocabulary:
    """Letters, digits, and merges that GPT-2's splitter would apply to a run of digits."""
    merges = [("1", "2"), ("12", "3"), ("Ġ", "a"), ("a", "b")]
    letters = [*"0123456789", "Ġ", "Ċ", "a", "b"]
    return GgufVocabulary(
        [*SPECIAL, *letters, *("".join(m) for m in merges)], merges, SPECIAL, "{{ messages }}"
    )


def test_every_digit_is_a_token_although_a_merge_exists(vocabulary: GgufVocabulary) -> None:
    tokenizer = build_tokenizer(vocabulary)
    assert tokenizer.encode("ab 1234").tokens == ["ab", "Ġ", "1", "2", "3", "4"]
    # The splitter that other rebuilds fall back to gives other ids: the case that this module is for.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert "123" in tokenizer.encode("1234").tokens


def test_ids_are_the_files_and_nothing_is_added_around_a_text(vocabulary: GgufVocabulary) -> None:
    tokenizer = build_tokenizer(vocabulary)
    assert [tokenizer.token_to_id(token) for token in vocabulary.tokens] == list(
        range(len(vocabulary.tokens))
    )
    assert tokenizer.decode(tokenizer.encode("ab ab\n12").ids) == "ab ab\n12"
    assert tokenizer.encode("a<|im_end|>").ids[-1] == 2


def test_saved_folder_keeps_the_splitter_and_the_base_models_roles(
    vocabulary: GgufVocabulary, tmp_path: Path
) -> None:
    save_folder(build_tokenizer(vocabulary), vocabulary, tmp_path)
    reloaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert reloaded.encode("1234").tokens == ["1", "2", "3", "4"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["bos_token"] == "<|endoftext|>"
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_transformers_takes_the_saved_folder_as_it_is(vocabulary: GgufVocabulary, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_folder(build_tokenizer(vocabulary), vocabulary, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("ab 1234") == ["ab", "Ġ", "1", "2", "3", "4"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 2)


def test_a_tokenizer_of_another_family_is_refused(
    vocabulary: GgufVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer(vocabulary)
    with pytest.raises(DataError, match="21 tokens; SmolLM2's has 49,152"):
        check_smollm2(tokenizer)
    monkeypatch.setattr(gguf_tokenizer, "VOCABULARY_SIZE", 21)
    check_smollm2(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    with pytest.raises(DataError, match="splits 1234 into"):
        check_smollm2(tokenizer)


def test_merges_of_tokens_that_are_not_there(vocabulary: GgufVocabulary) -> None:
    vocabulary.merges.append(("x", "y"))
    with pytest.raises(DataError, match="merges do not fit its vocabulary"):
        build_tokenizer(vocabulary)
