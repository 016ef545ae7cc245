"""What `smol bench train` is to measure: a model by name or from a recipe, a layout as text, and the recipe they make.

Needs neither torch nor a GPU; `train` carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from megatron_smol.errors import UserError, nearest
from megatron_smol.recipe.load import load_recipe, parse_recipe
from megatron_smol.recipe.schema import Recipe
from megatron_smol.recipe.section import Precision

# The published shapes (huggingface/smollm, text/pretraining), and one small enough for a laptop's CPU.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2_1.7b": {"layers": 24, "hidden_size": 2048, "heads": 32, "kv_heads": 32, "ffn_size": 8192},
    "smollm2_360m": {
        "layers": 32,
        "hidden_size": 960,
        "heads": 15,
        "kv_heads": 5,
        "ffn_size": 2560,
        "init_std": 0.03227,
    },
    "smollm2_135m": {
        "layers": 30,
        "hidden_size": 576,
        "heads": 9,
        "kv_heads": 3,
        "ffn_size": 1536,
        "init_std": 1 / 24,
    },
    "tiny": {
        "layers": 4,
        "hidden_size": 256,
        "heads": 4,
        "kv_heads": 2,
        "ffn_size": 704,
        "vocab_size": 4096,
    },
}
PRECISIONS: tuple[str, ...] = get_args(Precision)
_LAYOUT = (
    "tp",
    "pp",
    "cp",
    "vpp",
    "sequence_parallel",
    "cp_comm",
    "recompute",
    "distributed_optimizer",
    "overlap",
)
_SHORT = {"sp": "sequence_parallel"}


@dataclass(frozen=True)
class Setting:
    """recipe: with the model, layout and batch to measure; steps are timed after `warmup` more."""

    name: str
    recipe: Recipe
    steps: int
    warmup: int


def parse_layout(text: str) -> dict[str, object]:
    """Read "tp=2,pp=1,sp=true" into fields of `parallel`."""
    found: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        name = _SHORT.get(name.strip(), name.strip())
        if not equals or name not in _LAYOUT:
            hint = nearest(name, (*_LAYOUT, *_SHORT))
            raise UserError(f"--layout has '{part}'; write such as tp=2,pp=1,sp=true ({hint})")
        found[name] = yaml.safe_load(value)
    return found


def make_setting(
    model: str,
    precision: str,
    seq_length: int,
    micro_batch: int,
    layout: str,
    steps: int,
    warmup: int,
    world_size: int,
    tokens: int | None = None,
) -> Setting:
    """`model`: a name of MODELS or a recipe's path; `tokens`: of one step over all ranks (default: a micro-batch each)."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision '{precision}' is not known; {nearest(precision, PRECISIONS)}")
    shape, optimizer = _model(model)
    parallel = parse_layout(layout)
    ranks = 1
    for name in ("tp", "pp", "cp"):
        degree = parallel.get(name, 1)
        if not isinstance(degree, int) or degree < 1:
            raise UserError(f"--layout has {name}={degree}; {name} is a whole number, at least 1")
        ranks *= degree
    if world_size % ranks:
        raise UserError(
            f"--layout '{layout}' needs a multiple of {ranks} ranks, and {world_size} were started; use torchrun "
            f"--nproc-per-node {ranks}"
        )
    unit = micro_batch * world_size // ranks
    # A virtual pipeline takes micro-batches in rounds of pp, and a pipeline of one micro-batch measures its bubble.
    windows = unit * int(str(parallel.get("pp", 1)))
    if tokens is not None:
        windows = tokens // seq_length
        if tokens % (unit * seq_length):
            raise UserError(
                f"--tokens {tokens:,} is no multiple of {unit * seq_length:,}, a micro-batch of {micro_batch} x {seq_length} "
                f"tokens on each of {world_size // ranks} data-parallel ranks"
            )
    document = {
        "name": "bench",
        "run_dir": "none",
        "tokenizer": "none",
        "model": shape,
        "sources": {"random": {"path": "none", "tokens": "1B"}},
        "training": {
            "seq_length": seq_length,
            "global_batch": windows,
            "micro_batch": micro_batch,
            "precision": precision,
        },
        "stages": [{"name": "bench", "until": f"{steps + warmup + 1} steps", "mixture": {"random": 1}}],
        "lr": {"peak": 1e-4},
        "optimizer": optimizer,
        "parallel": {**parallel, "gpus": world_size},
    }
    return Setting(model, parse_recipe(yaml.safe_dump(document), "smol bench train"), steps, warmup)


def _model(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `model` and `optimizer`."""
    if name in MODELS:
        return MODELS[name], {}
    if not Path(name).is_file():
        raise UserError(f"--model '{name}' is neither a recipe's file nor a model; {nearest(name, MODELS)}")
    recipe = load_recipe(Path(name), [])
    return recipe.model.model_dump(), recipe.optimizer.model_dump()
