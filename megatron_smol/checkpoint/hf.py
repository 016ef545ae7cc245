"""Hugging Face's Llama folders: config.json and safetensors, written and read tensor by tensor.

checkpoint/weights.py says which tensor goes where; checkpoint/convert.py joins this with distributed
checkpoints (checkpoint/dist.py) and publishes nothing that checkpoint/verify.py has not compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from megatron_smol.checkpoint.progress import progress
from megatron_smol.checkpoint.shards import (
    INDEX,
    SHARD_SIZE,
    SINGLE,
    TORCH_DTYPES,
    Place,
    places,
    write_shards,
)
from megatron_smol.checkpoint.weights import Weight, join_weight, split_weight, weight_map
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.recipe.schema import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# --- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What a Hugging Face folder says of a model besides its weights.

    seq_length: tokens, the longest it was trained on; special_ids: bos_token_id, eos_token_id, pad_token_id.
    rope_interleaved: how the *trainer's* rows are ordered (see `split_weight`); Hugging Face's never are.
    """

    model: Model
    rope_base: float
    seq_length: int
    special_ids: dict[str, int | list[int] | None]
    rope_interleaved: bool = False


def write_folder(
    folder: Path,
    described: Description,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write config.json, generation_config.json and the weights, cast to `dtype`; the tokenizer is the caller's.

    read: gives a tensor of the trainer by its name in `weight_map`; it is asked once for each.
    """
    _write_json(folder / "config.json", llama_config(described, dtype))
    special = {name: token for name, token in described.special_ids.items() if token is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    weights = weight_map(described.model)
    shapes = {
        name: shape for weight in weights for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
    }
    source = {name: weight for weight in weights for name in weight.hf}
    held: dict[str, Tensor] = {}  # parts whose turn in the file is later: at most those of a few weights
    bar = iter(progress(list(shapes), "writing safetensors"))

    def part(name: str) -> Tensor:
        next(bar)
        if name not in held:
            weight = source[name]
            whole = read(weight.megatron)
            parts = split_weight(weight, whole, described.model, described.rope_interleaved)
            held.update({name: part.to("cpu", dtype) for name, part in parts.items()})
        return held.pop(name)

    write_shards(folder, shapes, dtype, part, max_shard_size)
    next(bar, None)  # lets the bar go


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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HfFolder:
    """A local folder with a Llama model in safetensors."""

    path: Path
    described: Description

    @classmethod
    def open(cls, path: Path, rope_interleaved: bool = False) -> HfFolder:
        """Read config.json; CheckpointError for what this trainer has no model of.

        rope_interleaved: the order of rows that the trainer is to have, not this folder's.
        """
        config = _read_json(path / "config.json")
        generation = path / "generation_config.json"
        described = _describe(path, config, _read_json(generation) if generation.is_file() else {})
        return cls(path, replace(described, rope_interleaved=rope_interleaved))

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each tensor is; CheckpointError for a folder whose files are not whole."""
        if (self.path / INDEX).is_file():
            index = _read_json(self.path / INDEX).get("weight_map", {})
            found = {}
            for file in sorted(set(index.values())):
                inside = self._places(self.path / file)
                for name in (name for name, where in index.items() if where == file):
                    if name not in inside:
                        raise CheckpointError(
                            f"{self.path / file} lacks tensor {name}, which {INDEX} says is in it; fetch the "
                            "whole model"
                        )
                    found[name] = inside[name]
            return found
        if not (self.path / SINGLE).is_file():
            raise CheckpointError(
                f"{self.path} has neither {SINGLE} nor {INDEX}; weights are read from safetensors only "
                "(pickled .bin files can run code): save the model again with transformers"
            )
        return self._places(self.path / SINGLE)

    def _places(self, file: Path) -> dict[str, Place]:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, and {self.path / INDEX} lists it; fetch the whole model"
            )
        with _readable(file):
            return places(file)

    def tensor(self, name: str) -> Tensor:
        place = self.places[name]
        self._require_known(place.dtype)
        with _readable(place.file):
            return place.read()

    def _require_known(self, dtype: str) -> None:
        if dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self.path} has weights in {dtype}; allowed: {', '.join(TORCH_DTYPES)} (safetensors' names)"
            )

    def trainer_tensor(self, weight: Weight) -> Tensor:
        """The trainer's tensor, put together from this folder's."""
        described = self.described
        parts = tuple(self.tensor(name) for name in weight.hf)
        return join_weight(weight, parts, described.model, described.rope_interleaved)

    def require_all(self) -> None:
        """Refuse a folder whose tensors are not exactly those of the model its config.json describes."""
        shapes = {
            name: shape
            for weight in weight_map(self.described.model)
            for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
        }
        # A tied head may be stored as well, and old Llama files carry the angles of the rotary positions.
        found = {n for n in self.places if not n.endswith("rotary_emb.inv_freq")}
        if self.described.model.tied_embeddings:
            found -= {HEAD}
        if missing := sorted(shapes.keys() - found):
            raise CheckpointError(
                f"{self.path} lacks tensor {missing[0]} ({len(missing)} missing in all), which its "
                "config.json asks for; fetch the whole model"
            )
        if unknown := sorted(found - shapes.keys()):
            raise CheckpointError(
                f"{self.path} holds tensor {unknown[0]} ({len(unknown)} unknown in all), which a Llama model "
                "of this trainer (no biases, no adapters) has no place for"
            )
        for name, shape in shapes.items():
            if (stored := self.places[name].shape) != shape:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {list(stored)}, its config.json means {list(shape)}"
                )
        self._require_the_tied_head_to_be_the_embedding()

    def _require_the_tied_head_to_be_the_embedding(self) -> None:
        if self.described.model.tied_embeddings and HEAD in self.places:
            head, table = self.tensor(HEAD), self.tensor(EMBEDDING)
            if head.shape != table.shape or not torch.equal(head, table):
                raise CheckpointError(
                    f"{self.path} holds a {HEAD} that is not {EMBEDDING}, and its config.json says "
                    "tie_word_embeddings: true; set it to false if the head was trained by itself"
                )

    def dtype(self) -> torch.dtype:
        """bfloat16 when every weight is; else float32, which holds float16 and bfloat16 exactly."""
        names = {name for weight in weight_map(self.described.model) for name in weight.hf}
        found = {self.places[name].dtype for name in names}
        for dtype in found:
            self._require_known(dtype)
        return torch.bfloat16 if found == {"BF16"} else torch.float32


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read, it is cut off or damaged ({error}); fetch or export it again"
        ) from error


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
    return Description(model, rope_base, seq_length, ids)


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
