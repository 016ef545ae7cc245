"""A run folder and an ablation's folder as `smol train` and `smol ablate` leave them, with losses that a test chooses.

The plans, recipes and the table are the real ones; only what training would have measured is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_smol.ablate import results
from megatron_smol.ablate.config import load_ablation
from megatron_smol.ablate.recipes import STAGE, runs_of
from megatron_smol.recipe.document import to_json
from megatron_smol.recipe.load import dump_recipe, load_recipe
from megatron_smol.recipe.plan import make_plan

RECIPE = """\
name: small
run_dir: {folder}/run
tokenizer: none
model: {{layers: 2, hidden_size: 32, heads: 4, kv_heads: 2, ffn_size: 64, vocab_size: 640}}
data: {{holdout_tokens: 1000}}
sources:
  web: {{path: {folder}/web, tokens: 10M, max_epochs: 4}}
  code: {{path: {folder}/code, tokens: 2M, max_epochs: 4}}
  maths: {{path: {folder}/maths, tokens: 200k, max_epochs: 2}}   # little of it
  rubbish: {{path: {folder}/rubbish, tokens: 5M, max_epochs: 4}}
training: {{seq_length: 64, global_batch: 8, micro_batch: 2, precision: fp32}}
stages:
  # what ran
  - name: stable
    until: 2M
    mixture: {{web: 0.7, code: 0.2, rubbish: 0.1}}
  # what comes
  - name: next   # to be decided
    tokens: 1M
    mixture: {{web: 0.6, code: 0.2, maths: 0.1, rubbish: 0.1}}
  - name: last
    tokens: 500k
    mixture: {{web: 0.5, maths: 0.5}}
lr: {{peak: 1e-3, warmup: 10 steps}}
"""

Losses = Callable[[Mapping[str, float], int], dict[str, float]]


def write_run(folder: Path, recipe: str = RECIPE) -> Path:
    """A run whose first stage is done; returns its folder. folder/recipe.yaml is what a person wrote."""
    path, run = folder / "recipe.yaml", folder / "run"
    path.write_text(recipe.format(folder=folder))
    run.mkdir(parents=True, exist_ok=True)
    loaded = load_recipe(path)
    plan = make_plan(loaded)
    (run / "recipe.yaml").write_text(dump_recipe(loaded))
    (run / "plan.json").write_text(json.dumps(to_json(plan)))
    first = plan.stages[0]
    rows = {"stage": first.name, "stage_index": 0, "step": first.end_step, "tokens": first.end_tokens}
    (run / "metrics.jsonl").write_text(json.dumps(rows | {"seconds": 1.0}) + "\n")
    losses = {"web": 3.0, "code": 2.5, "maths": 4.0, "rubbish": 6.0}
    (run / "validation.jsonl").write_text(json.dumps(rows | {"when": "end", "losses": losses}) + "\n")
    return run


def write_ablation(folder: Path, run: Path, losses: Losses, **more: Any) -> Path:
    """Runs whose validation losses are losses(weights, seed), and their results.json; returns the ablation file."""
    path = folder / "ablation.yaml"
    settings = {
        "name": "test", "base": str(folder / "recipe.yaml"), "output": str(folder / "ablated"),
        "from": {"run": str(run), "stage": "stable", "at": "2M"}, "budget": "100 steps", "shares": [0.6],
        "candidates": {name: {name: 1} for name in ("maths", "code", "rubbish")}, "seeds": [0, 1],
        "rank_by": "loss:maths",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings | more, sort_keys=False))
    config = load_ablation(path)
    runs = runs_of(config)
    for one in runs:
        weights = {name: float(weight) for name, weight in one.stage.weights.items()}
        row = {"stage": STAGE, "when": "end", "losses": losses(weights, one.seed)}
        one.recipe.run_path.mkdir(parents=True, exist_ok=True)
        (one.recipe.run_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
        (one.recipe.run_path / "metrics.jsonl").write_text(
            json.dumps({"stage": STAGE, "seconds": 2.0}) + "\n"
        )
    results.write(config, results.collect(config, runs))
    return path


def planted(weights: Mapping[str, float], seed: int) -> dict[str, float]:
    """Maths lowers its loss, rubbish raises every loss, code does nothing to maths; seeds shift all arms alike, and a little
    noise is each arm's own."""
    own = 0.002 * ((seed * 7 + round(1000 * sum(w * w for w in weights.values()))) % 5 - 2)
    maths = 4 - 0.8 * weights.get("maths", 0) + 0.5 * weights.get("rubbish", 0) + 0.05 * seed + own
    return {
        "maths": maths,
        "web": 3 + 0.4 * weights.get("rubbish", 0) + own,
        "code": 2.5 - weights.get("code", 0),
    }
