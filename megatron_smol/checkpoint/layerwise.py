"""Whole models that borrow their weights: each module has them in memory only while it computes.

The gate (checkpoint/verify.py) must run megatron-core's and transformers' own forward passes on models that may
be larger than memory. Both are built on the meta device, without weights; hooks read a module's weights before
it runs and let go of them after. Nothing of the forward passes is written again here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_smol.checkpoint.hf import EMBEDDING, HEAD, Description, HfFolder
from megatron_smol.checkpoint.memory import give_memory_back
from megatron_smol.checkpoint.weights import map_name
from megatron_smol.errors import CheckpointError
from megatron_smol.model.backend import backend
from megatron_smol.model.llama import layer_spec, transformer_config
from megatron_smol.model.precision import precision
from megatron_smol.recipe.schema import Parallel

Read = Callable[[str], Tensor]
_ROWS_AT_ONCE = 1024  # of a table


@dataclass(frozen=True)
class Borrowing:
    """A model in fp32 that holds no weights.

    hidden: ids [b, s] -> final hidden states [b, s, h], reading every layer once; head: keeps the output layer's
    weight in memory for the block and yields it, or the one that is given if it holds the same numbers (the largest
    table of both models at once would be most of the gate's memory); logits: hidden states [rows, h] -> logits
    [rows, vocabulary] on the CPU.
    """

    model: Any
    hidden: Callable[[Tensor], Tensor]
    head: Callable[[Tensor | None], AbstractContextManager[Tensor]]
    logits: Callable[[Tensor], Tensor]


def trainer_model(described: Description, read: Read) -> Borrowing:
    """megatron-core's model; read: a weight by its name in `weight_map`."""
    gpt = _empty_gpt(described)
    device, tied = backend().device, described.model.tied_embeddings

    def weight(name: str) -> Tensor:
        return read(map_name(name)).to(device)

    _lend(gpt, weight, except_for=("output_layer",))
    embedding = gpt.embedding.word_embeddings

    def hidden(ids: Tensor) -> Tensor:
        states: Tensor = gpt(ids.to(device), None, None)  # [s, b, h]: without post_process, no logits
        return states.transpose(0, 1)

    def logits(rows: Tensor) -> Tensor:
        out: Tensor = gpt.output_layer(rows.unsqueeze(1), weight=embedding.weight if tied else None)[0]
        return out.squeeze(1).cpu()

    def head(like: Tensor | None) -> AbstractContextManager[Tensor]:
        if tied:
            return _borrowed(embedding, "embedding.word_embeddings.", weight, like)
        return _borrowed(gpt.output_layer, "output_layer.", weight, like)

    return Borrowing(gpt, hidden, head, logits)


def _empty_gpt(described: Description) -> GPTModel:
    model = described.model
    config = transformer_config(model, Parallel(), precision("fp32"))
    config.rotary_interleaved = described.rope_interleaved
    with torch.device("meta"):
        gpt = GPTModel(
            config,
            layer_spec(config, backend()),
            vocab_size=model.vocab_size,
            max_sequence_length=described.seq_length,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=described.rope_base,
        )
    gpt.post_process = False  # the decoder keeps its final norm; logits are made a few rows at a time
    return gpt.eval()


def transformers_model(folder: HfFolder) -> Borrowing:
    """transformers' model of a Hugging Face folder, every weight accounted for."""
    llama = _empty_llama(folder)
    tied = llama.config.tie_word_embeddings

    def weight(name: str) -> Tensor:
        if tied and name == EMBEDDING and not llama.lm_head.weight.is_meta:
            head: Tensor = llama.lm_head.weight  # in memory while text is generated; tied is one table
            return head
        return folder.tensor(EMBEDDING if tied and name == HEAD else name)

    _lend(llama, weight, except_for=("lm_head",))
    return Borrowing(
        llama,
        hidden=lambda ids: llama.model(ids, use_cache=False).last_hidden_state,
        head=lambda like: _borrowed(llama.lm_head, "lm_head.", weight, like),
        logits=lambda rows: llama.lm_head(rows),
    )


def _empty_llama(folder: HfFolder) -> Any:
    import transformers
    from transformers.models.llama import modeling_llama

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
        with torch.device("meta"):
            llama: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if (folder.path / "generation_config.json").is_file():
            llama.generation_config = transformers.GenerationConfig.from_pretrained(
                folder.path, local_files_only=True
            )
    except Exception as error:  # transformers raises a dozen kinds
        text = str(error).strip().splitlines()
        raise CheckpointError(
            f"transformers cannot load {folder.path}: {text[0] if text else type(error).__name__}"
        ) from error
    llama.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config)  # angles, which no file holds
    _require_every_weight(folder, {name: tuple(p.shape) for name, p in llama.named_parameters()})
    return llama.eval()


def _require_every_weight(folder: HfFolder, wanted: dict[str, tuple[int, ...]]) -> None:
    """What from_pretrained would invent or ignore with a warning is an error."""
    stored = {name: place.shape for name, place in folder.places.items()}
    ignored = {HEAD} if HEAD not in wanted else set()
    for kind, names in (
        ("lacks", wanted.keys() - stored),
        ("has no use for", {n for n in stored if not n.endswith("inv_freq")} - wanted.keys() - ignored),
        ("has another shape for", {n for n in wanted.keys() & stored if wanted[n] != stored[n]}),
    ):
        if names:
            where = "in" if kind == "lacks" else "of"
            raise CheckpointError(f"transformers {kind} weight {min(names)} {where} {folder.path}")


# --- borrowing ---------------------------------------------------------------------------------------------


def _lend(model: nn.Module, read: Read, except_for: tuple[str, ...]) -> None:
    """Hook every layer, and every module with weights outside of the layers."""
    layers = {
        f"{name}.{index}": layer
        for name, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        for index, layer in enumerate(layers)
    }
    others = {
        name: module
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False)) and not name.startswith((*layers, *except_for))
    }
    for name, module in (layers | others).items():
        prefix = f"{name}."
        module.register_forward_pre_hook(lambda m, _, prefix=prefix: _fill(m, prefix, read))
        module.register_forward_hook(lambda m, *_: _forget(m))


@contextmanager
def _borrowed(module: Any, prefix: str, read: Read, like: Tensor | None) -> Iterator[Tensor]:
    _fill(module, prefix, read, like)
    try:
        yield module.weight
    finally:
        _forget(module)


def _fill(module: nn.Module, prefix: str, read: Read, like: Tensor | None = None) -> None:
    for name, parameter in list(module.named_parameters()):
        tensor = read(prefix + name)
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{prefix}{name} has shape {list(tensor.shape)}, the model's is {list(parameter.shape)}"
            )
        same = like is not None and _same_numbers(tensor, like)
        _put(module, name, like if like is not None and same else tensor.to(torch.float32))


def _same_numbers(stored: Tensor, other: Tensor) -> bool:
    """Whether `stored`, as fp32, is `other`; a few rows at a time, as no copy of the whole may be made."""
    if stored.shape != other.shape or stored.device != other.device:
        return False
    pairs = zip(stored.split(_ROWS_AT_ONCE), other.split(_ROWS_AT_ONCE), strict=True)
    return all(torch.equal(mine.to(other.dtype), theirs) for mine, theirs in pairs)


def _forget(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        _put(module, name, torch.empty_like(parameter, device="meta"))
    give_memory_back()  # glibc keeps freed blocks of the size of a layer's weights: 185 MB of them for the 135M


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
