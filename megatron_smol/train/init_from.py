"""`init_from:` of a recipe: a new run's first weights are another model's.

train/run.py calls `initialise` when the run has no checkpoint of its own yet; from then on the run resumes from
its own. A checkpoint is read at any layout by megatron-core, a Hugging Face folder tensor by tensor, each rank
its own part. What was taken is recorded in the run folder, in init_from.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_smol.checkpoint import folder, store
from megatron_smol.checkpoint.agree import together
from megatron_smol.checkpoint.convert import known_tokenizer_sha256
from megatron_smol.checkpoint.dist import has_optimizer
from megatron_smol.checkpoint.folder import Checkpoint, read_checkpoint, verify_files
from megatron_smol.checkpoint.hf import HfFolder
from megatron_smol.checkpoint.weights import map_name, weight_map
from megatron_smol.data.tokenizer import load_tokenizer
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.model.llama import named_global_parameters, tensor_parallel_slice
from megatron_smol.recipe.schema import InitFrom, Model, Recipe
from megatron_smol.train.state import write_text
from megatron_smol.train.step import Engine
from megatron_smol.train.trainer import Trainer

RECORD = "init_from.json"


def initialise(trainer: Trainer, init: InitFrom) -> None:
    """Give the trainer the weights (and more, as `init.what` says) of `init.path`; all ranks return or raise alike."""
    recipe, path = trainer.plan.recipe, Path(init.path).expanduser()
    found: Checkpoint | HfFolder | None = None
    with together(f"opening init_from {path}"):
        found = _open(path, init, recipe)
    assert found is not None
    with together(f"checking init_from {path}", only_rank=0) as mine:
        if mine:
            record = _check(found, init, recipe)
            write_text(recipe.run_path / RECORD, json.dumps(record, indent=1) + "\n")
    if isinstance(found, HfFolder):
        with together(f"loading {path}"):
            _fill(trainer.engine, found)
        trainer.engine.optimizer.reload_model_params()
    elif init.what == "all":
        trainer.resume(found)
    else:
        store.load(trainer.engine, found, optimizer=init.what == "weights+optimizer")
    trainer.say(f"init_from {path}: took {_taken(init.what)}; recorded in {recipe.run_path / RECORD}")
    theirs, ours = _rope_base(found), trainer.plan.stages[0].rope_base
    if theirs != ours and init.what != "all":
        trainer.say(
            f"warning: {path} was trained with rope_base {theirs:g}, and stage '{trainer.plan.stages[0].name}' trains "
            f"with {ours:g}; unless this is a context extension, set training.rope_base to {theirs:g}"
        )


def _taken(what: str) -> str:
    return {
        "weights": "the weights; optimizer, data and schedule start fresh",
        "weights+optimizer": "weights and optimizer; data and schedule start fresh",
        "all": "weights, optimizer, and the place in data and schedule",
    }[what]


def _open(path: Path, init: InitFrom, recipe: Recipe) -> Checkpoint | HfFolder:
    """What lies at the path, if its model is the recipe's."""
    if (path / "config.json").is_file():
        if init.what != "weights":
            raise UserError(
                f"init_from.what is '{init.what}', but {path} is a Hugging Face folder, which holds weights only; "
                "set it to weights"
            )
        hf_folder = HfFolder.open(path)
        hf_folder.require_all()
        _require_same_model(path, hf_folder.described.model, recipe.model)
        return hf_folder
    checkpoint = read_checkpoint(path)
    _require_same_model(path, Model(**checkpoint.state["model"]), recipe.model)
    if checkpoint.state.get("rope_interleaved"):
        raise CheckpointError(
            f"{path} has interleaved rotary rows, and this trainer's are half-split: export it with `smol convert "
            "to-hf`, and name that folder in init_from"
        )
    if init.what != "weights" and not has_optimizer(checkpoint.path):
        raise CheckpointError(
            f"init_from.what is '{init.what}', but {path} holds weights only; set it to weights"
        )
    stages = [stage.name for stage in recipe.stages]
    if init.what == "all" and checkpoint.stage not in stages:
        raise CheckpointError(
            f"init_from.what is 'all', but {path} stands in stage '{checkpoint.stage}', which this recipe does not "
            f"have ({', '.join(stages)}); use that run's recipe, or set what to weights+optimizer"
        )
    return checkpoint


def _require_same_model(path: Path, found: Model, wanted: Model) -> None:
    for name in Model.model_fields:
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if ours != theirs and name != "init_std":  # of no use once there are weights
            raise CheckpointError(
                f"init_from {path} is a model with {name} {theirs}, the recipe's model.{name} is {ours}; set it to "
                f"{theirs}, or start from another model"
            )


def _check(found: Checkpoint | HfFolder, init: InitFrom, recipe: Recipe) -> dict[str, Any]:
    """Files whole and tokenizer the recipe's; returns what the run folder remembers."""
    tokenizer = load_tokenizer(recipe.tokenizer)
    if isinstance(found, HfFolder):
        known = load_tokenizer(found.path).sha256 if (found.path / "tokenizer.json").is_file() else None
        files = sorted({found.path / "config.json", *(place.file for place in found.places.values())})
        origin: dict[str, Any] = {"sha256": {file.name: folder.sha256(file) for file in files}}
    else:
        verify_files(found.path)
        known = known_tokenizer_sha256(found.state)
        origin = {key: found.state.get(key) for key in ("run", "stage", "step", "tokens", "rope_base")}
        origin["sha256"] = {folder.COMPLETE: folder.sha256(found.path / folder.COMPLETE)}
    if known is None:
        raise CheckpointError(
            f"init_from {found.path}: the tokenizer that it was trained with is not there, so it cannot be compared "
            f"with the recipe's ({recipe.tokenizer}); put its tokenizer.json back"
        )
    if known != tokenizer.sha256:
        raise CheckpointError(
            f"init_from {found.path} was trained with another tokenizer ({known[:12]}) than the recipe's, "
            f"{recipe.tokenizer} (vocabulary {tokenizer.vocab_size:,}, {tokenizer.sha256[:12]}); its weights mean "
            "nothing with these ids: set tokenizer to that model's own"
        )
    return {"path": str(found.path.resolve()), "what": init.what, **origin, "tokenizer_sha256": known}


@torch.no_grad()
def _fill(engine: Engine, hf_folder: HfFolder) -> None:
    """Copy this rank's part of every weight."""
    weights = {weight.megatron: weight for weight in weight_map(hf_folder.described.model)}
    for gpt in engine.gpts:
        for name, parameter, split in named_global_parameters(gpt):
            whole = hf_folder.trainer_tensor(weights[map_name(name)])
            parameter.copy_(tensor_parallel_slice(whole, split) if split else whole)


def _rope_base(found: Checkpoint | HfFolder) -> float:
    return found.described.rope_base if isinstance(found, HfFolder) else float(found.state["rope_base"])
