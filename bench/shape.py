"""The model that the step and checkpoint benches train: the 1.7B's shape at 30M parameters, small vocabulary."""

from __future__ import annotations

import torch

from bench.common import CORES
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.schema import Recipe
from megatron_smol.train.step import Engine

LENGTH, MICRO_BATCH, MICRO_BATCHES = 512, 2, 1
TOKENS_PER_STEP = LENGTH * MICRO_BATCH * MICRO_BATCHES
ROPE_BASE = 10000.0

RECIPE = f"""
name: bench
seed: 42
run_dir: nowhere
tokenizer: none
model: {{layers: 8, hidden_size: 512, heads: 8, kv_heads: 8, ffn_size: 1408, vocab_size: 8192, tied_embeddings: true}}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: {LENGTH}, global_batch: {MICRO_BATCH * MICRO_BATCHES}, micro_batch: {MICRO_BATCH}, precision: fp32}}
stages: [{{name: one, until: 100 steps, mixture: {{a: 1}}}}]
lr: {{peak: 5e-4}}
"""


def build() -> tuple[Recipe, Engine]:
    """The recipe and this process's engine, on all cores (OMP_NUM_THREADS decides otherwise)."""
    torch.set_num_threads(threads())
    recipe = parse_recipe(RECIPE)
    return recipe, Engine(recipe, LENGTH, ROPE_BASE, "fp32")


def threads() -> int:
    import os

    return int(os.environ.get("OMP_NUM_THREADS", CORES))


def describe(recipe: Recipe) -> dict[str, object]:
    """For the result file."""
    model = recipe.model
    return {
        "parameters": model.parameters(),
        "shape": model.model_dump(),
        "length": LENGTH,
        "tokens_per_step": TOKENS_PER_STEP,
        "precision": "fp32",
        "threads": torch.get_num_threads(),
    }
