"""The weight map: which tensors of Hugging Face's Llama hold the numbers of which tensor of the trainer.

Pure description, used by checkpoint/hf.py (safetensors), checkpoint/dist.py (distributed checkpoints) and
checkpoint/layerwise.py (the gate's models): a tensor of the trainer becomes one or more of Hugging Face's
and back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_smol.recipe.schema import Model

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of the trainer, and the Hugging Face tensors (of these shapes) with the same numbers."""

    megatron: str
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    layout: Literal["same", "qkv", "gate_up"] = "same"

    @property
    def shape(self) -> Shape:
        """Of the trainer's tensor: Hugging Face's, one below the other."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])


@lru_cache
def weight_map(model: Model) -> tuple[Weight, ...]:
    """Every weight of the model, in Hugging Face's order."""
    h, f, table = model.hidden_size, model.ffn_size, (model.vocab_size, model.hidden_size)
    kv = (model.kv_heads * model.head_dim, h)
    weights = [Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (table,))]
    for index in range(model.layers):
        ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
        q, k, v, o = (f"{theirs}.self_attn.{part}_proj.weight" for part in "qkvo")
        gate, up, down = (f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        norms = f"{theirs}.input_layernorm.weight", f"{theirs}.post_attention_layernorm.weight"
        weights += [
            Weight(f"{ours}.input_layernorm.weight", norms[:1], ((h,),)),
            Weight(f"{ours}.self_attention.linear_qkv.weight", (q, k, v), ((h, h), kv, kv), "qkv"),
            Weight(f"{ours}.self_attention.linear_proj.weight", (o,), ((h, h),)),
            Weight(f"{ours}.pre_mlp_layernorm.weight", norms[1:], ((h,),)),
            Weight(f"{ours}.mlp.linear_fc1.weight", (gate, up), ((f, h), (f, h)), "gate_up"),
            Weight(f"{ours}.mlp.linear_fc2.weight", (down,), ((h, f),)),
        ]
    weights.append(Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((h,),)))
    if not model.tied_embeddings:
        weights.append(Weight("output_layer.weight", ("lm_head.weight",), (table,)))
    return tuple(weights)


def split_weight(
    weight: Weight, tensor: Tensor, model: Model, interleaved: bool = False
) -> dict[str, Tensor]:
    """The trainer's tensor as Hugging Face's, by name; views where the layout allows.

    interleaved: the trainer rotates pairs (0, 1), (2, 3), ... of a head's rows, as the 1.7B was trained and as
    Megatron's --rotary-interleaved does; Hugging Face rotates (0, d/2), (1, d/2 + 1), ...
    """
    match weight.layout:
        case "qkv":
            parts: tuple[Tensor, ...] = _split_qkv(tensor, model)
            if interleaved:
                q, k, v = parts
                parts = half_split(q, model.head_dim), half_split(k, model.head_dim), v
        case "gate_up":
            parts = tensor.chunk(2, 0)
        case _:
            parts = (tensor,)
    return dict(zip(weight.hf, parts, strict=True))


def join_weight(weight: Weight, parts: tuple[Tensor, ...], model: Model, interleaved: bool = False) -> Tensor:
    """The inverse of `split_weight`."""
    if weight.layout == "qkv":
        q, k, v = parts
        if interleaved:
            q, k = interleave(q, model.head_dim), interleave(k, model.head_dim)
        return _join_qkv(q, k, v, model)
    return torch.cat(parts) if weight.layout == "gate_up" else parts[0]


def _split_qkv(qkv: Tensor, model: Model) -> tuple[Tensor, ...]:
    """[(heads + 2 kv_heads) * d, h], a block a query group (its q heads, k, v), as q, k and v."""
    queries = model.heads // model.kv_heads  # q heads that share a k and a v
    groups = qkv.view(model.kv_heads, queries + 2, model.head_dim, -1)
    return tuple(part.reshape(-1, qkv.size(1)) for part in groups.split([queries, 1, 1], dim=1))


def _join_qkv(q: Tensor, k: Tensor, v: Tensor, model: Model) -> Tensor:
    kv, d = model.kv_heads, model.head_dim
    grouped = [part.view(kv, heads, d, -1) for part, heads in ((q, model.heads // kv), (k, 1), (v, 1))]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """[heads * d, h] with interleaved rotary pairs as the same rows in Hugging Face's order."""
    return rows.view(-1, head_dim // 2, 2, rows.size(1)).transpose(1, 2).reshape(rows.shape)


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `half_split`."""
    return rows.view(-1, 2, head_dim // 2, rows.size(1)).transpose(1, 2).reshape(rows.shape)


# --- names -------------------------------------------------------------------------------------------------

# Transformer Engine's fused layers hold the norm that comes before them; the map has it by its own name.
_NORMS_INSIDE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def map_name(name: str) -> str:
    """A parameter's name, of megatron-core's local or of Transformer Engine's layers, as `weight_map` has it."""
    for ending, own in _NORMS_INSIDE.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + own
    return name


def megatron_tensors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A GPTModel's parameters by the names of `weight_map`."""
    return {map_name(name): tensor.detach() for name, tensor in parameters.items()}
