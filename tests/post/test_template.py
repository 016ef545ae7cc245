"""The chat format: SmolLM2's text to the letter, the assistant's tokens, and the roles of the control tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_smol.errors import DataError
from megatron_smol.post.template import CHATML_MARKED, load_chat_tokenizer

# As huggingface/alignment-handbook, recipes/smollm2, has it.
PUBLISHED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": " Hi?\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("turns", [TURNS, [SYSTEM, *TURNS], TURNS[:1]])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_the_published_templates(base: Path, turns: list[dict[str, str]], prompt: bool) -> None:
    tokenizer = load_chat_tokenizer(base)
    ours, marked, published = (
        tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        for template in (tokenizer.chat_template, CHATML_MARKED, PUBLISHED)
    )
    assert ours == marked == published
    assert ("SmolLM, trained by" in ours) == (turns[0]["role"] != "system")


def test_the_assistants_tokens_end_with_the_end_of_its_turn(base: Path) -> None:
    tokenizer = load_chat_tokenizer(base)
    encoded = tokenizer.apply_chat_template(
        TURNS, chat_template=CHATML_MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [i for i, marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(ids) == "Hello.<|im_end|>So long.<|im_end|>"


def test_roles(base: Path) -> None:
    tokenizer = load_chat_tokenizer(base)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>"


def test_a_tokenizer_without_turn_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "hf"))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] != "<|im_start|>"
    ]
    path.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"has no special token <\|im_start\|>, which frame .* SmolLM2's tokenizer"
    ):
        load_chat_tokenizer(folder)
