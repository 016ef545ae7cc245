"""A small valid recipe for tests, and ways to bend it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.schema import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = ("smollm2_1.7b", "smollm2_360m", "smollm2_135m", "demo")

SMALL: dict[str, Any] = {
    "name": "small",
    "run_dir": "runs/small",
    "tokenizer": "tok",
    "model": {"layers": 4, "hidden_size": 96, "heads": 12, "kv_heads": 6, "ffn_size": 384, "vocab_size": 768},
    "sources": {
        "web": {"path": "w", "tokens": "1M"},
        "code": {"path": "c", "tokens": "1M"},
        "math": {"path": "m", "tokens": "1M"},
    },
    "training": {"seq_length": 64, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
    "stages": [
        {"name": "stable", "until": "100 steps", "mixture": {"web": 0.9, "code": 0.1}},
        {"name": "decay", "until": "150 steps", "mixture": {"web": 0.5, "math": 0.5}},
        {
            "name": "long",
            "from": {"stage": "decay", "before_end": "10 steps"},
            "tokens": "10 steps",
            "seq_length": 256,
            "global_batch": 2,
            "mixture": {"math": 1},
        },
    ],
    "lr": {"peak": 1e-3, "warmup": "10 steps", "decay_start": "120 steps"},
}


def small(**changes: Any) -> dict[str, Any]:
    """SMALL with dotted paths changed ("stages.0.until"); a value of None removes the key."""
    data = copy.deepcopy(SMALL)
    for path, value in changes.items():
        *parents, last = path.split(".")
        holder: Any = data
        for key in parents:
            holder = holder[int(key)] if key.isdecimal() else holder.setdefault(key, {})
        key = int(last) if last.isdecimal() else last
        if value is None:
            del holder[key]
        else:
            holder[key] = value
    return data


def load(data: dict[str, Any], *overrides: str) -> Recipe:
    """Through the YAML text, as a user's file goes."""
    return parse_recipe(yaml.safe_dump(data, sort_keys=False), "recipe.yaml", overrides)
