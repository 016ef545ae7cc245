"""The weight map both ways, and Hugging Face folders that are not what they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_smol.checkpoint import hf
from megatron_smol.checkpoint.hf import HfFolder
from megatron_smol.checkpoint.shards import SINGLE, write_shards
from megatron_smol.checkpoint.weights import (
    Weight,
    half_split,
    interleave,
    join_weight,
    megatron_tensors,
    split_weight,
    weight_map,
)
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.recipe.schema import Model
from tests.checkpoint.shapes import ROPE_BASE, build, describe, models, small_model, tensors_of


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = small_model()
    hf.write_folder(tmp_path, describe(model), tensors_of(model).__getitem__, torch.float32)
    return tmp_path


@settings(max_examples=40, deadline=None)
@given(models(), st.booleans())
def test_split_and_join_are_inverse(model: Model, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in weight_map(model):
        tensor = torch.randn(weight.shape, generator=generator)
        parts = split_weight(weight, tensor, model, interleaved)
        assert tuple(parts) == weight.hf
        assert [tuple(part.shape) for part in parts.values()] == list(weight.hf_shapes)
        assert torch.equal(join_weight(weight, tuple(parts.values()), model, interleaved), tensor)


def test_rows_go_where_the_formats_say() -> None:
    model = small_model(hidden_size=48, heads=6, kv_heads=2)  # 3 q heads share a k and a v; head_dim 8
    rows = [f"{kind}{head}" for group in (0, 1) for kind, head in _group(group) for _ in range(8)]
    labels = {label: number for number, label in enumerate(dict.fromkeys(rows))}
    tensor = torch.tensor([[float(labels[row])] for row in rows])
    weight = Weight("qkv", ("q", "k", "v"), ((48, 1), (16, 1), (16, 1)), "qkv")
    for kind, part in split_weight(weight, tensor, model).items():
        heads = model.heads if kind == "q" else model.kv_heads
        expected = [labels[f"{kind}{head}"] for head in range(heads) for _ in range(8)]
        assert part.flatten().int().tolist() == expected


def test_interleaved_pairs_become_halves() -> None:
    rows = torch.arange(16.0).view(16, 1)  # two heads of width 8
    expected = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert half_split(rows, 8).flatten().int().tolist() == expected
    assert torch.equal(interleave(half_split(rows, 8), 8), rows)


def _group(group: int) -> list[tuple[str, int]]:
    return [*(("q", 3 * group + head) for head in range(3)), ("k", group), ("v", group)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_map_names_every_parameter_of_both(tied: bool) -> None:
    model = small_model(tied_embeddings=tied)
    parameters = megatron_tensors(dict(build(model).named_parameters()))
    shapes = {weight.megatron: weight.shape for weight in weight_map(model)}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**hf.llama_config(describe(model), torch.float32))
    )
    names = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    pairs = [pair for weight in weight_map(model) for pair in zip(weight.hf, weight.hf_shapes, strict=True)]
    assert dict(pairs) == names


def test_transformer_engine_keeps_its_norms_inside() -> None:
    inside = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
    renamed = megatron_tensors({f"decoder.layers.3.{name}": torch.ones(1) for name in inside})
    assert set(renamed) == {
        "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
    }


def test_config_says_the_rope_base_to_old_and_new_transformers(exported: Path) -> None:
    raw = json.loads((exported / "config.json").read_text())
    assert raw["rope_theta"] == ROPE_BASE and raw["rope_scaling"] is None  # transformers 4
    config = transformers.AutoConfig.from_pretrained(exported)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": ROPE_BASE}
    assert config.dtype == torch.float32 and config.max_position_embeddings == 128
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (2, 2, True)
    assert transformers.GenerationConfig.from_pretrained(exported).eos_token_id == 2


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    model = small_model()
    tensors = tensors_of(model)
    hf.write_folder(tmp_path, describe(model), tensors.__getitem__, torch.float32, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / SINGLE).exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(theirs["model.embed_tokens.weight"], tensors["embedding.word_embeddings.weight"])
    folder = HfFolder.open(tmp_path)
    folder.require_all()
    assert all(torch.equal(folder.trainer_tensor(w), tensors[w.megatron]) for w in weight_map(model))


def test_a_size_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max-shard-size many is not a size; write it as 5GB"):
        hf.write_folder(
            tmp_path, describe(small_model()), tensors_of(small_model()).__getitem__, torch.float32, "many"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_those_that_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{size}.é": torch.randn(size, 3).to(dtype) for size in (10, 1, 7)}
    write_shards(tmp_path, {name: tuple(t.shape) for name, t in tensors.items()}, dtype, tensors.__getitem__)
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "library").read_bytes()


def test_weights_are_as_readable_as_the_rest(exported: Path) -> None:
    modes = {file.stat().st_mode & 0o777 for file in exported.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type mistral; this trainer has llama only"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act gelu; this trainer has silu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "scales RoPE by 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "scales RoPE by 'linear'"),
        ({"head_dim": 16}, "head_dim 16, this trainer has hidden_size / heads = 48 / 6"),
        ({"num_hidden_layers": 0}, "does not describe a Llama model"),
        ({"hidden_size": None}, "does not describe a Llama model"),
    ],
)
def test_models_of_another_kind_are_refused(exported: Path, change: dict[str, Any], message: str) -> None:
    _edit(exported / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        HfFolder.open(exported)


def test_old_configs_are_understood(exported: Path) -> None:
    _edit(exported / "config.json", {"rope_parameters": None, "head_dim": None, "rope_theta": 77777.0})
    described = HfFolder.open(exported).described
    assert described.rope_base == 77777.0 and described.model.head_dim == 8


def test_tensors_that_do_not_fit_are_named(exported: Path) -> None:
    tensors = load_file(exported / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    _write(exported, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=rf"lacks tensor {name} \(1 missing"):
        HfFolder.open(exported).require_all()
    _write(exported, tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})
    with pytest.raises(CheckpointError, match=r"holds tensor model.layers.0.self_attn.q_proj.bias"):
        HfFolder.open(exported).require_all()
    _write(exported, tensors | {name: torch.ones(48, 40)})
    with pytest.raises(CheckpointError, match=r"up_proj.weight has shape \[48, 40\], .* \[40, 48\]"):
        HfFolder.open(exported).require_all()
    _write(exported, tensors | {name: torch.ones(40, 48, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match=r"weights in F64; allowed: F32"):
        HfFolder.open(exported).dtype()
    _write(exported, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    HfFolder.open(exported).require_all()  # a tied head that is stored as well
    _write(exported, tensors | {"lm_head.weight": torch.ones(640, 48)})
    with pytest.raises(CheckpointError, match=r"lm_head.weight that is not model.embed_tokens.weight"):
        HfFolder.open(exported).require_all()


def test_damaged_and_missing_files_are_named(exported: Path) -> None:
    weights = exported / SINGLE
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        HfFolder.open(exported).require_all()
    weights.rename(exported / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="read from safetensors only"):
        HfFolder.open(exported).require_all()
    (exported / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        HfFolder.open(exported)
    (exported / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        HfFolder.open(exported)


def test_a_missing_shard_and_a_lying_index(tmp_path: Path) -> None:
    model = small_model()
    hf.write_folder(tmp_path, describe(model), tensors_of(model).__getitem__, torch.float32, "40KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    content = second.read_bytes()
    second.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=rf"{second.name} cannot be read, it is cut off or damaged"):
        HfFolder.open(tmp_path).require_all()
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name} is missing, and .*index.json lists it; fetch"):
        HfFolder.open(tmp_path).require_all()
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=rf"{second.name} lacks tensor .*index.json says is in it"):
        HfFolder.open(tmp_path).require_all()


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no folder ./nowhere: give a Hugging Face model folder"):
        hf.locate("./nowhere")


def _edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
