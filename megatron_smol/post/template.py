"""SmolLM2's chat format: ChatML with a default system turn, and the roles of the three control tokens.

The base models' tokenizer already holds the tokens; SFT gives them their roles, and what it writes carries
template and roles to every later user of the model (transformers' pipeline, DPO, `smol chat`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_smol.errors import CheckpointError, DataError

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
SYSTEM_TURN = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM_TURN + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}TURN{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TURN = "{{ message['content'] + '<|im_end|>' }}"
CHATML = _TEMPLATE.replace("TURN", _TURN)
# The same text; transformers' {% generation %} marks the tokens that the assistant writes, its end included.
CHATML_MARKED = _TEMPLATE.replace(
    "TURN",
    "{% if message['role'] == 'assistant' %}{% generation %}" + _TURN + "{% endgeneration %}"
    "{% else %}" + _TURN + "{% endif %}",
)


def load_chat_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer with SmolLM2's chat roles; DataError when its vocabulary lacks the tokens."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    if lacking := [token for token in (TURN_START, TURN_END) if token not in special]:
        raise DataError(
            f"the tokenizer of {folder} has no special token {' and no '.join(lacking)}, which frame the turns "
            "of a chat; pretrain and export with SmolLM2's tokenizer, or add the tokens to tokenizer.json and "
            "their rows to the model"
        )
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = TURN_START, TURN_END, TURN_END
    if END_OF_TEXT in special:
        tokenizer.unk_token = END_OF_TEXT
    tokenizer.chat_template = CHATML
    tokenizer.padding_side = "right"
    return tokenizer


def set_roles(model: Any, tokenizer: Any) -> None:
    """Let the model's configuration and generation agree with the tokenizer: stop and pad are <|im_end|>."""
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
