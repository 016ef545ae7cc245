"""Distributed checkpoints read and written without a model: names of both layer kinds, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_smol.checkpoint import dist, store
from megatron_smol.checkpoint.dist import StoredWeights, has_optimizer, write_weights
from megatron_smol.checkpoint.folder import Checkpoint
from megatron_smol.checkpoint.weights import weight_map
from megatron_smol.errors import CheckpointError
from tests.checkpoint.shapes import build, equal, save_checkpoint, small_model, tensors_of, weights

MODEL = small_model(layers=3, tied_embeddings=False)


def test_what_is_written_is_what_megatron_core_loads(tmp_path: Path) -> None:
    tensors = tensors_of(MODEL)
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    write_weights(tmp_path, weight_map(MODEL), MODEL.layers, torch.float32, read)
    assert sorted(asked) == sorted(weight.megatron for weight in weight_map(MODEL))  # each once
    gpt = build(MODEL, seed=9)
    store.load_model(gpt, Checkpoint(tmp_path, {}))
    assert equal(weights(gpt), weights(build(MODEL)))
    stored = StoredWeights(tmp_path)
    assert equal({name: stored.read(name) for name in tensors}, tensors)
    assert not has_optimizer(tmp_path)


@pytest.mark.parametrize("fused", [True, False], ids=["Transformer Engine", "local"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "by layer"])
def test_names_of_both_layer_kinds_are_found(tmp_path: Path, fused: bool, stacked: bool) -> None:
    """Transformer Engine keeps a norm inside the layer after it; megatron-core stacks equal layers, or not."""
    tensors, stored_as = tensors_of(MODEL), {}
    for name, tensor in tensors.items():
        renamed = name
        if fused:
            renamed = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            renamed = renamed.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        stored_as[renamed] = tensor
    if stacked:
        rest = {name: tensor for name, tensor in stored_as.items() if ".layers." not in name}
        inner = {name.split(".", 3)[3] for name in stored_as if ".layers." in name}
        stored_as = rest | {
            f"decoder.layers.{name}": torch.stack(
                [stored_as[f"decoder.layers.{layer}.{name}"] for layer in range(MODEL.layers)]
            )
            for name in inner
        }
    save(stored_as | {"optimizer.x": torch.ones(3)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    found = StoredWeights(tmp_path)
    found.require(weight_map(MODEL))
    assert equal({name: found.read(name) for name in tensors}, tensors)
    assert has_optimizer(tmp_path)


def test_weights_that_are_not_the_models(tmp_path: Path) -> None:
    tensors = tensors_of(MODEL)
    bias = {"decoder.layers.0.self_attention.linear_qkv.bias": torch.ones(80)}
    few = {name: tensor for name, tensor in tensors.items() if name != "output_layer.weight"}
    for number, (stored, message) in enumerate(
        (
            (few, r"lacks weight output_layer.weight \(1 missing"),
            (tensors | bias, r"holds weight decoder.layers.0.self_attention.linear_qkv.bias \(1 unknown"),
            (
                tensors | {"decoder.final_layernorm.weight": torch.ones(50)},
                r"decoder.final_layernorm.weight of shape \[50\], its state.json describes a model with \[48\]",
            ),
        )
    ):
        path = tmp_path / str(number)
        save(stored, storage_writer=FileSystemWriter(path), no_dist=True)
        with pytest.raises(CheckpointError, match=message):
            StoredWeights(path).require(weight_map(MODEL))


def test_damage_is_named(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "a", MODEL, tmp_path)
    stored, shard = StoredWeights(saved.path), next(saved.path.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{shard.name} cannot be read"):
        stored.read("output_layer.weight")
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} cannot be read \(.*No such file"):
        stored.read("output_layer.weight")
    stored._chunks["output_layer.weight"].clear()
    with pytest.raises(CheckpointError, match=r"does not say where all of output_layer.weight is stored"):
        stored.read("output_layer.weight")
    assert dist._LAYER.fullmatch("decoder.layers.final") is None
