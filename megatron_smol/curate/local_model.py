"""A Hugging Face model on this machine in place of an endpoint; `endpoint` uses it when there is no address."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smol.device import on_gpu
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.post.generate import load_model

if TYPE_CHECKING:
    from megatron_smol.curate.endpoint import Answer, Request

_KNOWN = {
    "messages", "prompt", "temperature", "top_p", "max_tokens", "seed", "stop", "add_generation_prompt",
    "continue_final_message",
}  # fmt: skip


class LocalModel:
    """Answers requests one at a time. Raises CheckpointError for a folder that holds no such model."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no model folder {folder}; give one, or the `url` of an endpoint")
        self.folder = folder
        self._model, self._tokenizer = load_model(folder)
        self._model.to("cuda" if on_gpu() else "cpu")
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Answer:
        from megatron_smol.curate.endpoint import Answer, Unusable

        if unknown := sorted(set(request.payload) - _KNOWN):
            raise UserError(
                f"a model of this machine knows no {unknown[0]}; it takes {', '.join(sorted(_KNOWN))}"
            )
        ids = self._ids(request.payload)
        room = self._model.config.max_position_embeddings - ids.size(1)
        if room < 1:
            raise Unusable("prompt too long", again=False)
        with self._lock:
            made = self._generate(ids, request.payload, room)
        text = self._tokenizer.decode(made, skip_special_tokens=True)
        for stop in request.payload.get("stop", []):
            text = text.split(stop)[0]
        ended = len(made) < min(room, request.payload.get("max_tokens", room))
        return Answer(text, "stop" if ended else "length", ids.size(1), len(made))

    def _ids(self, payload: dict[str, Any]) -> Any:
        """Of the prompt, [1, s]."""
        if "prompt" in payload:
            encoded = self._tokenizer(payload["prompt"], return_tensors="pt", add_special_tokens=False)
        elif self._tokenizer.chat_template:
            encoded = self._tokenizer.apply_chat_template(
                payload["messages"],
                add_generation_prompt=payload.get("add_generation_prompt", True),
                continue_final_message=payload.get("continue_final_message", False),
                return_tensors="pt",
                return_dict=True,
            )
        else:
            raise CheckpointError(f"{self.folder} has no chat template, so it cannot answer a conversation")
        return encoded["input_ids"].to(self._model.device)

    def _generate(self, ids: Any, payload: dict[str, Any], room: int) -> list[int]:
        """The new ids, without what ends a text."""
        import torch

        temperature = float(payload.get("temperature", 1.0))
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            top_p = float(payload.get("top_p", 1.0))
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if stop := payload.get("stop"):
            sampling |= {"stop_strings": list(stop), "tokenizer": self._tokenizer}
        ends = self._model.generation_config.eos_token_id or self._tokenizer.eos_token_id
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(payload.get("seed", 0)))
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(room, int(payload.get("max_tokens", room))),
                pad_token_id=self._tokenizer.eos_token_id,
                **sampling,
            )
        new: list[int] = out[0, ids.size(1) :].tolist()
        return [token for token in new if token not in (ends if isinstance(ends, list) else [ends])]
