"""The small tokenizer of the data tests serves here too."""

from tests.data.conftest import tokenizer, tokenizer_folder

__all__ = ["tokenizer", "tokenizer_folder"]
