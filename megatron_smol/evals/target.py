"""Who is asked: MODEL of the command line as a `Target`, and its weights in Hugging Face form.

A target is a Hugging Face folder, a hub name, a checkpoint or a run folder. Checkpoints are exported for the
time of the evaluation, by `smol convert` in a process of its own: the trainer's CPU backend changes torch, and
an evaluation on a GPU must not see that.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_smol.checkpoint.folder import COMPLETE, STATE, Checkpoint, list_checkpoints, read_checkpoint
from megatron_smol.data.files import sha256_file
from megatron_smol.errors import CheckpointError, UserError
from megatron_smol.post.output import RECORD

RESULTS = "evals.jsonl"
# What decides a model's answers; results and optimizer files in the same folder do not.
_MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*", "special_tokens_map.json", "*.jinja")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Target:
    """A model to evaluate. tokens: it was trained on, None where that is not known; fingerprint: of its files."""

    name: str
    path: Path
    is_checkpoint: bool
    fingerprint: str
    results: Path  # where its rows go
    tokens: int | None = None
    stage: str | None = None
    step: int | None = None


def find_target(model: str) -> Target:
    """The model that MODEL names; a run folder stands for its newest checkpoint."""
    path = Path(model).expanduser()
    if not path.exists():
        return _hub_target(model)
    if (path / "config.json").is_file():
        return _hf_target(model, path, path.resolve().parent / RESULTS)
    if (path / "checkpoints").is_dir() or (path / STATE).is_file() or (path / COMPLETE).is_file():
        return _checkpoint_target(read_checkpoint(path))
    raise CheckpointError(
        f"{path} is no model: a Hugging Face folder has config.json, a checkpoint {COMPLETE}, a run folder "
        "checkpoints/"
    )


def stage_ends(run: str) -> list[Target]:
    """What a run folder has of finished work: the checkpoint at each stage's end in the order of training, SFT, DPO."""
    folder = Path(run).expanduser()
    try:
        plan = json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--stages needs a run folder, and {folder}/plan.json cannot be read: {error}"
        ) from error
    ends = {(stage["name"], stage["end_step"]) for stage in plan["stages"]}
    found = [c for c in list_checkpoints(folder / "checkpoints") if (c.stage, c.step) in ends]
    if not found:
        raise CheckpointError(
            f"no stage of {folder} has come to its end yet; evaluate its newest checkpoint without --stages"
        )
    tail = [folder / kind for kind in ("sft", "dpo") if (folder / kind / RECORD).is_file()]
    return [
        *(_checkpoint_target(checkpoint) for checkpoint in found),
        *(_hf_target(str(path), path, folder / RESULTS) for path in tail),
    ]


@contextmanager
def as_hf_folder(target: Target) -> Iterator[Path]:
    """The target's weights and tokenizer in Hugging Face form; a checkpoint's are gone after the block."""
    if not target.is_checkpoint:
        yield target.path
        return
    with tempfile.TemporaryDirectory(prefix="smol-eval-") as folder:
        print(f"exporting {target.name} for the evaluation; its logits are compared", file=sys.stderr)
        out = Path(folder) / "hf"
        _export(target.path, out)
        yield out


def _export(checkpoint: Path, out: Path) -> None:
    command = [sys.executable, "-m", "megatron_smol", "convert", "to-hf", str(checkpoint), str(out)]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in ranks} | {"SMOL_DEVICE": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason was given"]
        raise CheckpointError(f"{checkpoint} could not be exported: {told[-1].removeprefix('error: ')}")


def _hf_target(name: str, path: Path, results: Path) -> Target:
    if not any((path / file).is_file() for file in _TOKENIZERS):
        raise CheckpointError(f"{path} has no tokenizer.json; save the model's tokenizer into that folder")
    digest = hashlib.sha256()
    files = {file for pattern in _MODEL_FILES for file in path.glob(pattern)}
    if not any(file.suffix == ".safetensors" for file in files):
        raise CheckpointError(f"{path} has no weights (*.safetensors)")
    for file in sorted(files):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return Target(name, path, False, digest.hexdigest(), results)


def _hub_target(name: str) -> Target:
    from megatron_smol.checkpoint.hf import locate

    return _hf_target(name, locate(name), Path(RESULTS))


def _checkpoint_target(checkpoint: Checkpoint) -> Target:
    folder = checkpoint.path.resolve().parent
    run = folder.parent if folder.name == "checkpoints" else folder
    return Target(
        name=str(checkpoint.path),
        path=checkpoint.path,
        is_checkpoint=True,
        fingerprint=sha256_file(checkpoint.path / COMPLETE),  # it holds the checksum of every other file
        results=run / RESULTS,
        tokens=int(checkpoint.state["tokens"]) if "tokens" in checkpoint.state else None,
        stage=checkpoint.stage,
        step=checkpoint.step,
    )
