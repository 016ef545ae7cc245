"""Small models and checkpoints for the conversion tests: weights large enough that attention matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel

from megatron_smol.checkpoint import folder, store
from megatron_smol.checkpoint.hf import Description
from megatron_smol.checkpoint.weights import megatron_tensors
from megatron_smol.data.ledger import Ledger
from megatron_smol.model.llama import build_model
from megatron_smol.model.precision import precision
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.schema import Model, Parallel
from megatron_smol.train.step import Engine, init_parallel

VOCABULARY, LENGTH, ROPE_BASE = 640, 128, 130000.0  # the tests' tokenizer has 600 ids: a padded vocabulary
SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": None}


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Any shape of the family: odd query groups, one key/value head, tied or not."""
    kv_heads, queries = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(2, 8))
    hidden_size = kv_heads * queries * head_dim
    return Model(
        layers=draw(st.integers(1, 3)),
        hidden_size=hidden_size,
        heads=kv_heads * queries,
        kv_heads=kv_heads,
        ffn_size=draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(600, 700)),
        tied_embeddings=draw(st.booleans()),
        norm_eps=1e-5,
        init_std=min(0.2, 1.5 / hidden_size**0.5),  # logits of a trained model's size, however wide
    )


def small_model(**changes: Any) -> Model:
    shape: dict[str, Any] = {
        "layers": 2,
        "hidden_size": 48,
        "heads": 6,
        "kv_heads": 2,
        "ffn_size": 40,
        "vocab_size": VOCABULARY,
        "tied_embeddings": True,
        "init_std": 0.15,
    }
    return Model(**shape | changes)


def describe(model: Model) -> Description:
    return Description(model, ROPE_BASE, LENGTH, SPECIAL_IDS)


def build(model: Model, seed: int = 1) -> GPTModel:
    """The trainer's model in this process; norms are not all ones, as after training."""
    init_parallel(1, 1)
    [gpt] = build_model(model, Parallel(), precision("fp32"), LENGTH, ROPE_BASE, seed)
    unsettle_norms(gpt)
    return gpt


@torch.no_grad()
def unsettle_norms(gpt: GPTModel) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in gpt.parameters():
        if parameter.dim() == 1:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


def state(model: Model, tokenizer: Path, name: str = "fp32") -> dict[str, Any]:
    """state.json of a run's checkpoint, as far as a conversion reads it."""
    return {
        "stage": "one",
        "stage_index": 0,
        "step": 3,
        "seq_length": LENGTH,
        "rope_base": ROPE_BASE,
        "precision": name,
        "model": model.model_dump(),
        "tokenizer": str(tokenizer),
        "ledger": Ledger({}).to_json(),
    }


def save_checkpoint(path: Path, model: Model, tokenizer: Path, name: str = "fp32") -> folder.Checkpoint:
    gpt = build(model)
    gpt.to(precision(name).params_dtype)
    store.save_model(gpt, path, state(model, tokenizer, name))
    return folder.read_checkpoint(path)


def save_from_ranks(path: str, tokenizer: str, tp: int, pp: int, name: str) -> None:
    """What a training run leaves: weights and optimizer of every rank. Run by helpers.run_ranks."""
    model = small_model(tied_embeddings=pp == 1)
    engine = _engine(model, tp, pp, name, LENGTH, ROPE_BASE)
    for gpt in engine.gpts:
        unsettle_norms(gpt)
    store.save(engine, Path(path), state(model, Path(tokenizer), name), 16 * model.parameters())


def relayout(source: str, target: str, tp: int, pp: int) -> None:
    """Load a checkpoint into a trainer of this layout and save it from there. Run by helpers.run_ranks."""
    checkpoint = folder.read_checkpoint(Path(source))
    known = checkpoint.state
    model = Model(**known["model"])
    engine = _engine(model, tp, pp, known["precision"], known["seq_length"], known["rope_base"])
    store.load(engine, checkpoint, optimizer=False)
    store.save(engine, Path(target), known, 16 * model.parameters())


def _engine(model: Model, tp: int, pp: int, name: str, length: int, rope_base: float) -> Engine:
    torch.set_num_threads(1)
    recipe = parse_recipe(
        f"""
name: shapes
run_dir: nowhere
tokenizer: none
model: {model.model_dump_json()}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: {length}, global_batch: 8, micro_batch: 2, precision: {name}}}
stages: [{{name: one, until: 100 steps, mixture: {{a: 1}}}}]
lr: {{peak: 1e-3}}
parallel: {{tp: {tp}, pp: {pp}}}
"""
    )
    return Engine(recipe, length, rope_base, name)


def weights(gpt: GPTModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same names, types and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    """The weights of `build(model)` by the names of the weight map."""
    return megatron_tensors(dict(build(model).named_parameters()))
