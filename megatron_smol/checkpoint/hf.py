"""Hugging Face's Llama folders: the weight map in both directions, config.json, safetensors.

Pure description and files: a tensor of the trainer becomes one or more of Hugging Face's and back, exactly.
checkpoint/convert.py joins this with distributed checkpoints and publishes nothing that checkpoint/verify.py
has not compared. Rotary positions are half-split on both sides, so q and k rows keep their order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.recipe.schema import Model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000

# --- the weight map ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One tensor of the trainer, and the Hugging Face tensors that hold the same numbers."""

    megatron: str
    hf: tuple[str, ...]
    layout: Literal["same", "qkv", "gate_up"] = "same"


def weight_map(model: Model) -> tuple[Weight, ...]:
    """Every weight of the model, in Hugging Face's order."""
    weights = [Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))]
    for index in range(model.layers):
        ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
        q, k, v, o = (f"{theirs}.self_attn.{part}_proj.weight" for part in "qkvo")
        gate, up, down = (f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        weights += [
            Weight(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",)),
            Weight(f"{ours}.self_attention.linear_qkv.weight", (q, k, v), "qkv"),
            Weight(f"{ours}.self_attention.linear_proj.weight", (o,)),
            Weight(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",)),
            Weight(f"{ours}.mlp.linear_fc1.weight", (gate, up), "gate_up"),
            Weight(f"{ours}.mlp.linear_fc2.weight", (down,)),
        ]
    weights.append(Weight("decoder.final_layernorm.weight", ("model.norm.weight",)))
    if not model.tied_embeddings:
        weights.append(Weight("output_layer.weight", ("lm_head.weight",)))
    return tuple(weights)


def split_weight(weight: Weight, tensor: Tensor, model: Model) -> dict[str, Tensor]:
    """The trainer's tensor as Hugging Face's, by name; views where the layout allows."""
    match weight.layout:
        case "qkv":
            parts: tuple[Tensor, ...] = _split_qkv(tensor, model)
        case "gate_up":
            parts = tensor.chunk(2, 0)
        case _:
            parts = (tensor,)
    return dict(zip(weight.hf, parts, strict=True))


def join_weight(weight: Weight, parts: tuple[Tensor, ...], model: Model) -> Tensor:
    """The inverse of `split_weight`; raises RuntimeError when the shapes are not the model's."""
    if weight.layout == "qkv":
        q, k, v = parts
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


def megatron_tensors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A GPTModel's parameters by the names of `weight_map`: Transformer Engine's layers hold norms inside."""
    inside = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    renamed = {}
    for name, tensor in parameters.items():
        ending = next((e for e in inside if name.endswith(e)), None)
        renamed[name.removesuffix(ending) + inside[ending] if ending else name] = tensor.detach()
    return renamed


# --- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What a Hugging Face folder says of a model besides its weights.

    seq_length: tokens, the longest it was trained on; special_ids: bos_token_id, eos_token_id, pad_token_id.
    """

    model: Model
    rope_base: float
    seq_length: int
    special_ids: dict[str, int | None]


def write_folder(
    folder: Path, described: Description, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write config.json, generation_config.json and the weights; the tokenizer is the caller's.

    tensors: the trainer's, by the names of `weight_map`. Weights are cast to `dtype`.
    """
    _write_json(folder / "config.json", llama_config(described, dtype))
    special = {name: token for name, token in described.special_ids.items() if token is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    weights = weight_map(described.model)
    assert {weight.megatron for weight in weights} == tensors.keys()
    shapes = {
        name: part.to(dtype)
        for weight in weights
        for name, part in split_weight(weight, tensors[weight.megatron].to("meta"), described.model).items()
    }
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        wanted = set(names)
        shard: dict[str, Tensor] = {}
        for weight in weights:
            if wanted.intersection(weight.hf):
                parts = split_weight(weight, tensors[weight.megatron], described.model)
                shard |= {name: _own_copy(parts[name], dtype) for name in wanted.intersection(weight.hf)}
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors shuts others out
    if plan.is_sharded:
        _write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def llama_config(described: Description, dtype: torch.dtype) -> dict[str, Any]:
    """config.json; RoPE and dtype under the names of transformers 4 and of 5."""
    model, name = described.model, str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **described.special_ids,
        "dtype": name,
        "torch_dtype": name,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": described.seq_length,
        "mlp_bias": False,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": described.rope_base},
        "rope_scaling": None,
        "rope_theta": described.rope_base,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def _own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """safetensors wants contiguous tensors that share no memory."""
    return tensor.to("cpu", dtype).clone(memory_format=torch.contiguous_format)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HfFolder:
    """A local folder with a Llama model in safetensors."""

    path: Path
    described: Description

    @classmethod
    def open(cls, path: Path) -> HfFolder:
        """Read config.json; CheckpointError for what this trainer has no model of."""
        config = _read_json(path / "config.json")
        generation = path / "generation_config.json"
        return cls(path, _describe(path, config, _read_json(generation) if generation.is_file() else {}))

    @cached_property
    def files(self) -> dict[str, Path]:
        """In which file each tensor is."""
        if (self.path / INDEX).is_file():
            index = _read_json(self.path / INDEX).get("weight_map", {})
            return {name: self.path / file for name, file in index.items()}
        if not (self.path / SINGLE).is_file():
            raise CheckpointError(
                f"{self.path} has neither {SINGLE} nor {INDEX}; weights are read from safetensors only "
                "(pickled .bin files can run code): save the model again with transformers"
            )
        with self._reading(self.path / SINGLE) as file:
            return dict.fromkeys(file.keys(), self.path / SINGLE)

    def tensor(self, name: str) -> Tensor:
        with self._reading(self.files[name]) as file:
            found: Tensor = file.get_tensor(name)
        return found

    def _reading(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); fetch or export it again") from error

    def require_all(self) -> None:
        """Refuse a folder whose tensors are not exactly those of the model its config.json describes."""
        wanted = {name for weight in weight_map(self.described.model) for name in weight.hf}
        # A tied head may be stored as well, and old Llama files carry the angles of the rotary positions.
        found = {n for n in self.files if not n.endswith("rotary_emb.inv_freq")}
        if self.described.model.tied_embeddings:
            found -= {"lm_head.weight"}
        if missing := sorted(wanted - found):
            raise CheckpointError(
                f"{self.path} lacks tensor {missing[0]} ({len(missing)} missing in all), which its "
                "config.json asks for; fetch the whole model"
            )
        if unknown := sorted(found - wanted):
            raise CheckpointError(
                f"{self.path} holds tensor {unknown[0]} ({len(unknown)} unknown in all), which a Llama model "
                "of this trainer (no biases, no adapters) has no place for"
            )

    def dtype(self) -> torch.dtype:
        """bfloat16 when every weight is; else float32, which holds float16 and bfloat16 exactly."""
        found = {self.tensor(name).dtype for weight in weight_map(self.described.model) for name in weight.hf}
        if unknown := found - {torch.float32, torch.bfloat16, torch.float16}:
            raise CheckpointError(
                f"{self.path} has weights in {unknown.pop()}; allowed: float32, bfloat16, float16"
            )
        return torch.bfloat16 if found == {torch.bfloat16} else torch.float32

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the weights into the trainer's tensors, one at a time."""
        for weight in weight_map(self.described.model):
            target = tensors[weight.megatron]
            parts = split_weight(weight, target.to("meta"), self.described.model)
            read = {name: self.tensor(name) for name in weight.hf}
            for name, part in parts.items():
                if read[name].shape != part.shape:
                    raise CheckpointError(
                        f"{self.path}: {name} has shape {list(read[name].shape)}, its config.json means "
                        f"{list(part.shape)}"
                    )
            target.copy_(join_weight(weight, tuple(read.values()), self.described.model))


_FIXED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}


def _describe(path: Path, config: dict[str, Any], generation: dict[str, Any]) -> Description:
    """config.json's fields as this package's; CheckpointError naming what it cannot train."""
    for name, allowed in _FIXED.items():
        if (found := config.get(name, allowed[-1])) not in allowed:
            raise CheckpointError(
                f"{path}/config.json has {name} {found}; this trainer has {allowed[0]} only"
            )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise CheckpointError(f"{path}/config.json scales RoPE by '{kind}'; this trainer has 'default' only")
    try:
        model = Model(
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            ffn_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=config.get("tie_word_embeddings", False),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            init_std=config.get("initializer_range", 0.02),
        )
        rope_base = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
        seq_length = int(config.get("max_position_embeddings", 2048))
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{path}/config.json does not describe a Llama model: {error}") from error
    if model.hidden_size % model.heads or config.get("head_dim") not in (None, model.head_dim):
        raise CheckpointError(
            f"{path}/config.json has head_dim {config.get('head_dim')}, this trainer has hidden_size / heads "
            f"= {model.hidden_size} / {model.heads} only"
        )
    ids = {n: generation.get(n, config.get(n)) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    first = {name: token[0] if isinstance(token, list) else token for name, token in ids.items()}
    return Description(model, rope_base, seq_length, first)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a Hugging Face model folder has it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def locate(name: str) -> Path:
    """The local folder `name`, or the hub model of that name, fetched."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no folder {name}: give a Hugging Face model folder, or a hub name (OWNER/NAME)")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        )
    except Exception as error:  # the hub client raises a dozen kinds: offline, not found, gated, no cache
        raise UserError(
            f"could not fetch the model {name} from the hub ({type(error).__name__}), and no local folder "
            "has that name; go online, or give a local folder"
        ) from error
