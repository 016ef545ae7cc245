"""Documents as vectors of a frozen Hugging Face model; a classifier's head is fitted on them (`classifier`).

Sentence encoders say how their tokens become one vector (sentence-transformers' 1_Pooling/config.json): the first token
(Snowflake-arctic-embed-m, FineWeb-Edu's) or the mean (multilingual-e5-small, MiniLM). A language model (Llama, SmolLM2)
serves too, by the mean: its first token sees nothing of what follows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_smol.device import on_gpu
from megatron_smol.errors import UserError

Pooling = Literal["first", "mean"]
_BATCH = 32


class Encoder:
    """A model in memory, on the GPU where there is one. length: tokens of a document that it sees."""

    def __init__(self, name: str, pooling: Pooling | None, length: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModel.from_pretrained(name).eval()
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"encoder {name}: no Hugging Face model can be loaded from there ({reason})"
            ) from None
        self._model.to("cuda" if on_gpu() else "cpu")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # masked: any token does
        self._length = length
        self.pooling = self._chosen(name, pooling)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, hidden size]; texts of like length share a batch, so that little is computed on padding."""
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda number: len(encoded[number]))
        rows: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(texts)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            for number, row in zip(batch, self._vectors([encoded[i] for i in batch]), strict=True):
                rows[number] = row
        return np.stack(rows)

    def _vectors(self, ids: list[list[int]]) -> NDArray[np.float32]:
        import torch

        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state.float()  # [documents, tokens, hidden]
        if self.pooling == "first":
            return np.asarray(states[:, 0].cpu())
        mask = batch["attention_mask"].unsqueeze(-1)
        return np.asarray(((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())

    def _chosen(self, name: str, asked: Pooling | None) -> Pooling:
        self.pooling = "first"
        one, other = self._vectors(self._tokenizer(["the same, then", "the same end"])["input_ids"])
        sees_the_text = not np.array_equal(one, other)
        if asked == "first" and not sees_the_text:
            raise UserError(
                f"pooling `first`: the first token of {name} sees nothing of the text that follows, so every document "
                "would have the same vector; use `mean`"
            )
        return asked or _told(name) or ("first" if sees_the_text else "mean")


def _told(name: str) -> Pooling | None:
    """By the model's own sentence-transformers files; None where it has none."""
    from transformers.utils import cached_file

    found: Any = cached_file(
        name,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    about = json.loads(Path(found).read_text())
    return "mean" if about.get("pooling_mode_mean_tokens") else "first"
