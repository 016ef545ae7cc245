"""`smol convert`: a checkpoint of any layout to a Hugging Face folder and back, published only if both agree.

    checkpoint ─ store.load_model ─► GPTModel ─ hf.write_folder ─► OUT aside ─ verify.compare ─► OUT
    HF folder ─ hf.HfFolder.fill ─► GPTModel ─ store.save_model ─► OUT aside ─ verify.compare ─► OUT

One process, fp32, no optimizer. A conversion that fails leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from pydantic import ValidationError
from safetensors import SafetensorError

from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint import hf, store
from megatron_smol.checkpoint.folder import Checkpoint, read_checkpoint, verify_files
from megatron_smol.checkpoint.hf import Description, HfFolder
from megatron_smol.checkpoint.verify import (
    ROUNDED_TO_BF16,
    SAME_WEIGHTS,
    TEXT,
    Agreement,
    compare,
    require_same_tokenizer,
    text_windows,
)
from megatron_smol.data.ledger import Ledger
from megatron_smol.data.tokenizer import Tokenizer, load_tokenizer
from megatron_smol.errors import CheckpointError, UserError, nearest
from megatron_smol.model.backend import seed_random_streams
from megatron_smol.model.llama import build_model
from megatron_smol.model.precision import precision
from megatron_smol.recipe.schema import Model, Parallel
from megatron_smol.train.state import versions
from megatron_smol.train.step import init_parallel

IMPORTED = "imported"  # the stage that state.json of an imported checkpoint names
Say = Callable[[str], None]


def to_hf(
    source: Path,
    out: Path,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    text: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Export checkpoint `source` as the Hugging Face folder `out`; returns what was compared.

    tokenizer: name or folder, default the run's. dtype: fp32 or bf16, default as it was trained. text: file
    to compare on. Raises CheckpointError, and writes nothing, when transformers computes anything else.
    """
    _one_process()
    checkpoint = read_checkpoint(source)
    source = checkpoint.path
    state = checkpoint.state
    described, trained = _describe(checkpoint)
    dtype = dtype or trained
    if dtype not in hf.DTYPES:
        raise UserError(f"--dtype {dtype} is not known; {nearest(dtype, hf.DTYPES)}")
    words = _open_tokenizer(tokenizer or state["tokenizer"], described.model)
    end = words.eod_id  # as SmolLM2's base models: begin and end of text are the same token
    special = state.get("special_ids") or {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    described = Description(described.model, described.rope_base, described.seq_length, special)
    with published(out, overwrite) as aside:
        say(f"reading {source}: {described.model.parameters():,} parameters trained in {trained}")
        verify_files(source)
        gpt = _empty_model(described)
        store.load_model(gpt, checkpoint)
        with _writing(out):
            hf.write_folder(aside, described, _tensors(gpt), hf.DTYPES[dtype])
            words.save(aside)
        windows = _windows(words, text, described)
        require_same_tokenizer(aside, TEXT, words.encode_batch([TEXT])[0].tolist())
        say(f"comparing with the trainer's model in fp32, window length {windows[0].size(1)}")
        agreement = _gate_export(gpt, aside, windows, dtype, trained, f"exporting {source}", say)
    say(f"wrote {out} ({dtype}): {agreement.describe()}")
    return agreement


def _gate_export(
    gpt: GPTModel, aside: Path, windows: list[torch.Tensor], dtype: str, trained: str, what: str, say: Say
) -> Agreement:
    """The mapping is judged with equal weights on both sides; rounding to bf16, if asked for, on its own."""
    if (dtype, trained) == ("bf16", "fp32"):
        rounded = compare(gpt, aside, windows)
        rounded.require(ROUNDED_TO_BF16, f"{what} rounded to bf16")
        say(
            f"rounding fp32 weights to bf16 moved the logits by {rounded.relative_difference:.2%} of their "
            f"spread, at most {rounded.largest_difference:.1e} (allowed {ROUNDED_TO_BF16.relative:.0%}), "
            f"and the loss from {rounded.loss_trainer:.6f} to {rounded.loss_hf:.6f} "
            f"(allowed {ROUNDED_TO_BF16.loss} nats)"
        )
        gpt.to(torch.bfloat16).to(torch.float32)
    agreement = compare(gpt, aside, windows)
    agreement.require(SAME_WEIGHTS, what)
    return agreement


def from_hf(
    source: str,
    out: Path,
    *,
    tokenizer: str | None = None,
    text: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Import a Hugging Face folder (or hub name) as the checkpoint folder `out`, weights only.

    What is compared is read back from the written files. Raises CheckpointError, and writes nothing, when the
    trainer computes anything else than transformers.
    """
    _one_process()
    path = hf.locate(source)
    folder = HfFolder.open(path)
    folder.require_all()
    described, name = folder.described, tokenizer or _lasting_name(source)
    words = _open_tokenizer(name, described.model)
    trained = "bf16" if folder.dtype() is torch.bfloat16 else "fp32"
    with published(out, overwrite) as aside:
        say(f"reading {path}: {described.model.parameters():,} parameters in {trained}")
        gpt = _empty_model(described)
        folder.fill(_tensors(gpt))
        gpt.to(hf.DTYPES[trained])
        aside.rmdir()  # store.save_model makes it
        store.save_model(gpt, aside, _imported_state(described, source, name, trained))
        gpt.to(torch.float32)
        _forget(gpt)
        store.load_model(gpt, read_checkpoint(aside))
        windows = _windows(words, text, described)
        say(f"comparing with the trainer's model in fp32, window length {windows[0].size(1)}")
        agreement = compare(gpt, path, windows)
        agreement.require(SAME_WEIGHTS, f"importing {source}")
    say(f"wrote {out} ({trained}): {agreement.describe()}")
    return agreement


# --- what a checkpoint says of its model -------------------------------------------------------------------


def _describe(checkpoint: Checkpoint) -> tuple[Description, str]:
    """The model as config.json will have it (special ids apart), and the dtype of the stored weights."""
    state = checkpoint.state
    try:
        model = Model(**state["model"])
        stages = state["ledger"]["stages"]
        longest = max(int(state["seq_length"]), *(int(stage["seq_length"]) for stage in stages), 0)
        described = Description(model, float(state["rope_base"]), longest, {})
        trained = "bf16" if precision(state["precision"]).bf16 else "fp32"
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/{on_disk.STATE} lacks what an export needs: {error!r}"
        ) from error
    return described, trained


def _imported_state(described: Description, source: str, tokenizer: str, dtype: str) -> dict[str, Any]:
    """state.json with the keys of a run's own checkpoints; nothing was read of any source."""
    return {
        "run": source,
        "stage": IMPORTED,
        "stage_index": -1,
        "step": 0,
        "tokens": 0,
        "seq_length": described.seq_length,
        "rope_base": described.rope_base,
        "precision": dtype,
        "model": described.model.model_dump(),
        "tokenizer": tokenizer,
        "special_ids": described.special_ids,
        "sizes": {},
        "layout": {"tp": 1, "pp": 1, "dp": 1},
        "ledger": Ledger({}).to_json(),
        "hooks": {},
        "versions": versions(),
    }


def _open_tokenizer(name: str, model: Model) -> Tokenizer:
    try:
        words = load_tokenizer(name)
    except UserError as error:
        raise type(error)(f"{error} (with --tokenizer you can name another place)") from error
    if words.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"tokenizer {name} has {words.vocab_size:,} ids and the model's vocabulary {model.vocab_size:,}: "
            "it is another model's; name the right one with --tokenizer"
        )
    return words


def _lasting_name(source: str) -> str:
    """A hub name as it is; a folder by its full path, so that it is found from anywhere."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


# --- the model in this process -----------------------------------------------------------------------------


def _one_process() -> None:
    """A world of one, on the CPU unless SMOL_DEVICE says otherwise: conversion needs memory, not speed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "conversion runs in one process whatever the checkpoint's layout; start it without torchrun"
        )
    os.environ.setdefault("SMOL_DEVICE", "cpu")
    init_parallel(1, 1)
    if (
        parallel_state.get_tensor_model_parallel_world_size()
        * parallel_state.get_pipeline_model_parallel_world_size()
        > 1
    ):
        raise UserError("conversion cannot run inside a job with tensor or pipeline parallel ranks")
    seed_random_streams(0)


def _empty_model(described: Description) -> GPTModel:
    """The trainer's model in fp32, filled with NaN: what was not read cannot pass for read."""
    gpt = build_model(
        described.model, Parallel(), precision("fp32"), described.seq_length, described.rope_base, seed=0
    )
    _forget(gpt)
    return gpt


@torch.no_grad()
def _forget(gpt: GPTModel) -> None:
    for parameter in gpt.parameters():
        parameter.fill_(float("nan"))


def _tensors(gpt: GPTModel) -> dict[str, torch.Tensor]:
    return hf.megatron_tensors(dict(gpt.named_parameters()))


def _windows(words: Tokenizer, text: Path | None, described: Description) -> list[torch.Tensor]:
    try:
        content = TEXT if text is None else text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {text} cannot be read as text: {error}") from error
    return text_windows(words.encode_batch([content])[0].tolist(), described.seq_length)


# --- complete or absent ------------------------------------------------------------------------------------


@contextmanager
def published(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends well, else it vanishes."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder, or replace it with --overwrite")
    if out.exists() and not _replaceable(out):
        raise UserError(f"{out} holds no model, so --overwrite does not replace it; choose another folder")
    aside = out.parent / f"{on_disk.WRITING}{out.name}"
    try:
        with _writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
            aside.mkdir()
        yield aside
        with _writing(out):
            for path in (*aside.iterdir(), aside):
                on_disk.fsync(path)
            if out.exists():
                shutil.rmtree(out)
            aside.rename(out)
            on_disk.fsync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replaceable(out: Path) -> bool:
    """Whether --overwrite may remove it: a model's folder or an empty one, never somebody's home."""
    marks = ("config.json", on_disk.COMPLETE)
    return out.is_dir() and (any((out / mark).is_file() for mark in marks) or not any(out.iterdir()))


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A full disk or a forbidden folder in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written ({error}); nothing was left there") from error
