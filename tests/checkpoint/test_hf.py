"""The weight map both ways, and Hugging Face folders that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from megatron_smol.checkpoint import hf
from megatron_smol.checkpoint.hf import HfFolder, Weight, weight_map
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.recipe.schema import Model
from tests.checkpoint.shapes import ROPE_BASE, build, describe, models, small_model


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = small_model()
    tensors = hf.megatron_tensors(dict(build(model).named_parameters()))
    hf.write_folder(tmp_path, describe(model), tensors, torch.float32)
    return tmp_path


@settings(max_examples=40, deadline=None)
@given(models())
def test_split_and_join_are_inverse(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    d, h = model.head_dim, model.hidden_size
    for weight in weight_map(model):
        rows = {"qkv": (model.heads + 2 * model.kv_heads) * d, "gate_up": 2 * model.ffn_size}
        tensor = torch.randn(rows.get(weight.layout, 5), h, generator=generator)
        parts = hf.split_weight(weight, tensor, model)
        assert tuple(parts) == weight.hf
        assert torch.equal(hf.join_weight(weight, tuple(parts.values()), model), tensor)


def test_rows_go_where_the_formats_say() -> None:
    model = small_model(hidden_size=48, heads=6, kv_heads=2)  # 3 q heads share a k and a v; head_dim 8
    rows = [f"{kind}{head}" for group in (0, 1) for kind, head in _group(group) for _ in range(8)]
    labels = {label: number for number, label in enumerate(dict.fromkeys(rows))}
    tensor = torch.tensor([[float(labels[row])] for row in rows])
    weight = Weight("qkv", ("q", "k", "v"), "qkv")
    for kind, part in hf.split_weight(weight, tensor, model).items():
        heads = model.heads if kind == "q" else model.kv_heads
        expected = [labels[f"{kind}{head}"] for head in range(heads) for _ in range(8)]
        assert part.flatten().int().tolist() == expected


def _group(group: int) -> list[tuple[str, int]]:
    return [*(("q", 3 * group + head) for head in range(3)), ("k", group), ("v", group)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_map_names_every_parameter_of_both(tied: bool) -> None:
    model = small_model(tied_embeddings=tied)
    parameters = hf.megatron_tensors(dict(build(model).named_parameters()))
    assert {weight.megatron for weight in weight_map(model)} == parameters.keys()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**hf.llama_config(describe(model), torch.float32))
    )
    names = {name for name, _ in theirs.named_parameters()}
    assert {name for weight in weight_map(model) for name in weight.hf} == names


def test_transformer_engine_keeps_its_norms_inside() -> None:
    inside = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
    renamed = hf.megatron_tensors({f"decoder.layers.3.{name}": torch.ones(1) for name in inside})
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


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    gpt = build(model)
    tensors = hf.megatron_tensors(dict(gpt.named_parameters()))
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    hf.write_folder(tmp_path, describe(model), tensors, torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / hf.SINGLE).exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(theirs["model.embed_tokens.weight"], gpt.embedding.word_embeddings.weight)
    again = build(model, seed=2)
    HfFolder.open(tmp_path).fill(hf.megatron_tensors(dict(again.named_parameters())))
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), again.parameters(), strict=True))


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
    tensors = load_file(exported / hf.SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    _write(exported, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=rf"lacks tensor {name} \(1 missing"):
        HfFolder.open(exported).require_all()
    _write(exported, tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})
    with pytest.raises(CheckpointError, match=r"holds tensor model.layers.0.self_attn.q_proj.bias"):
        HfFolder.open(exported).require_all()
    _write(exported, tensors | {name: torch.ones(48, 40)})
    with pytest.raises(CheckpointError, match=r"up_proj.weight has shape \[48, 40\], .* \[40, 48\]"):
        HfFolder.open(exported).fill(hf.megatron_tensors(dict(build(small_model()).named_parameters())))
    _write(exported, tensors | {name: torch.ones(40, 48, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match=r"weights in torch.float64; allowed: float32"):
        HfFolder.open(exported).dtype()
    _write(exported, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    HfFolder.open(exported).require_all()  # a tied head that is stored as well


def test_damaged_and_missing_files_are_named(exported: Path) -> None:
    weights = exported / hf.SINGLE
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


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no folder ./nowhere: give a Hugging Face model folder"):
        hf.locate("./nowhere")


def _edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / hf.SINGLE, metadata={"format": "pt"})
