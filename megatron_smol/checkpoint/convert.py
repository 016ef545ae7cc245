"""`smol convert`: a checkpoint of any layout to a Hugging Face folder and back, published only if both agree.

    checkpoint ─ dist.StoredWeights.read ─► hf.write_folder ─► OUT aside ─ verify.compare ─► OUT
    HF folder ─ HfFolder.trainer_tensor ─► dist.write_weights ─► OUT aside ─ verify.compare ─► OUT

One process, tensor by tensor; the gate holds a layer of each model. A conversion that fails leaves nothing behind.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from pydantic import ValidationError
from torch import Tensor

from megatron_smol.checkpoint import dist, gguf, hf
from megatron_smol.checkpoint import folder as on_disk
from megatron_smol.checkpoint.dist import StoredWeights
from megatron_smol.checkpoint.folder import Checkpoint, read_checkpoint, verify_files
from megatron_smol.checkpoint.hf import Description, HfFolder
from megatron_smol.checkpoint.layerwise import Borrowing, trainer_model, transformers_model
from megatron_smol.checkpoint.memory import freed_memory_is_kept
from megatron_smol.checkpoint.publish import published, require_room, writing
from megatron_smol.checkpoint.report import Record
from megatron_smol.checkpoint.shards import SHARD_SIZE
from megatron_smol.checkpoint.verify import (
    ROUNDED_TO_BF16,
    SAME_WEIGHTS,
    TEXT,
    Agreement,
    compare,
    require_same_tokenizer,
    text_windows,
)
from megatron_smol.checkpoint.weights import weight_map
from megatron_smol.data.ledger import Ledger
from megatron_smol.data.tokenizer import Tokenizer, load_tokenizer
from megatron_smol.errors import CheckpointError, UserError, nearest
from megatron_smol.model.backend import seed_random_streams
from megatron_smol.model.precision import precision
from megatron_smol.recipe.schema import Model
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
    max_shard_size: str = SHARD_SIZE,
    rope_interleaved: bool = False,
    text: Path | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Export checkpoint `source` as the Hugging Face folder `out`; returns what was compared.

    tokenizer: name or folder, default the run's. dtype: fp32 or bf16, default as it was trained. rope_interleaved:
    the checkpoint was trained with interleaved rotary rows (an import remembers it). text: file to compare on.
    report: file for a JSON report, with a readable one beside it.
    Raises CheckpointError, and writes nothing but the report, when transformers computes anything else.
    """
    _one_process()
    gc.freeze()  # the libraries' objects stay: each collection would look at a million of them
    checkpoint = read_checkpoint(source)
    source, state = checkpoint.path, checkpoint.state
    described, trained = _describe(checkpoint, rope_interleaved)
    dtype = dtype or trained
    if dtype not in hf.DTYPES:
        raise UserError(f"--dtype {dtype} is not known; {nearest(dtype, hf.DTYPES)}")
    known = known_tokenizer_sha256(state) if tokenizer else state.get("tokenizer_sha256")
    words = _open_tokenizer(tokenizer or state["tokenizer"], described.model, known)
    described = _with_special_ids(described, state, words)
    record = Record("export", str(source), str(out), described.model.parameters(), dtype)
    with published(out, overwrite) as aside, record.kept_in(report, words):
        say(f"reading {source}: {described.model.parameters():,} parameters trained in {trained}")
        weights = weight_map(described.model)
        with record.timed("converting"), freed_memory_is_kept(), _verified_meanwhile(source), writing(out):
            require_room(out, described.model.parameters() * hf.DTYPES[dtype].itemsize)
            stored = StoredWeights(source)
            stored.require(weights)
            hf.write_folder(aside, described, stored.read, hf.DTYPES[dtype], max_shard_size)
            words.save(aside)
        record.files(source, aside, weights)
        windows = _windows(words, text, described)
        require_same_tokenizer(aside, TEXT, words.encode_batch([TEXT])[0].tolist())
        say(f"comparing with the trainer's model in fp32, window length {windows[0].size(1)}")
        with record.timed("comparing"):
            _gate_export(described, stored, aside, windows, (trained, dtype), record, say)
    assert record.agreement is not None
    say(f"wrote {out} ({dtype}): {record.agreement.describe()}")
    return record.agreement


@contextmanager
def _verified_meanwhile(checkpoint: Path) -> Iterator[None]:
    """Compare the files' checksums on another core; a damaged file is told as such, whatever it led to."""
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(verify_files, checkpoint)
        try:
            yield
        finally:
            checked.result()


def _gate_export(
    described: Description,
    stored: StoredWeights,
    aside: Path,
    windows: list[Tensor],
    dtypes: tuple[str, str],
    record: Record,
    say: Say,
) -> None:
    """The mapping is judged with equal weights on both sides; rounding to bf16, if asked for, on its own."""
    theirs = transformers_model(HfFolder.open(aside))
    what, written = f"exporting {stored.folder}", hf.DTYPES[dtypes[1]]
    if dtypes == ("fp32", "bf16"):
        rounded = record.rounded = compare(trainer_model(described, stored.read), theirs, windows)
        rounded.require(ROUNDED_TO_BF16, f"{what} rounded to bf16")
        say(
            f"rounding fp32 weights to bf16 moved the logits by {rounded.relative_difference:.2%} of their "
            f"spread, at most {rounded.largest_difference:.1e} (allowed {ROUNDED_TO_BF16.relative:.0%}), "
            f"and the loss from {rounded.loss_trainer:.6f} to {rounded.loss_hf:.6f} "
            f"(allowed {ROUNDED_TO_BF16.loss} nats)"
        )
    ours = trainer_model(described, lambda name: stored.read(name).to(written))
    _require_agreement(ours, theirs, windows, what, record, say)


def _require_agreement(
    ours: Borrowing, theirs: Borrowing, windows: list[Tensor], what: str, record: Record, say: Say
) -> None:
    """Refuse models that disagree, twice: wrong weights do so each time.

    Once, on an overloaded machine, two models differed by 1e-5 of their logits and not at all when the same files were
    compared again; what had changed the order of additions is not known. Both models are read anew from the files, so
    what is published has agreed, and what was seen before is told and stays in the report.
    """
    record.agreement = compare(ours, theirs, windows)
    try:
        record.agreement.require(SAME_WEIGHTS, what)
    except CheckpointError as error:
        say(f"comparing once more, as {error.args[0].removesuffix('; nothing was written')}")
        record.not_repeated, record.agreement = record.agreement, compare(ours, theirs, windows)
        record.agreement.require(SAME_WEIGHTS, what)
        say("the second comparison agrees: this machine did not compute the same twice")


def from_hf(
    source: str,
    out: Path,
    *,
    tokenizer: str | None = None,
    rope_interleaved: bool = False,
    text: Path | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Import a Hugging Face folder, hub name or GGUF file as the checkpoint folder `out`, weights only.

    rope_interleaved: order q and k rows for a trainer with interleaved rotary positions (not this package's).
    What is compared is read back from the written files. Raises CheckpointError, and writes nothing but the
    report, when the trainer computes anything else than transformers.
    """
    _one_process()
    gc.freeze()  # the libraries' objects stay: each collection would look at a million of them
    with published(out, overwrite) as aside, gguf.as_folder(source, aside, say) as local:
        path = local or hf.locate(source)
        folder = HfFolder.open(path, rope_interleaved)
        folder.require_all()
        described = folder.described
        trained = "bf16" if folder.dtype() is torch.bfloat16 else "fp32"
        own = load_tokenizer(path).sha256 if tokenizer and (path / "tokenizer.json").is_file() else None
        words = _open_tokenizer(tokenizer or str(path), described.model, own)
        name = tokenizer or (str(out.resolve() / gguf.TOKENIZER) if local else _lasting_name(source))
        record = Record("import", source, str(out), described.model.parameters(), trained)
        with record.kept_in(report, words):
            say(f"reading {source}: {described.model.parameters():,} parameters in {trained}")
            weights = weight_map(described.model)
            with record.timed("converting"), freed_memory_is_kept(), writing(out):
                require_room(out, described.model.parameters() * hf.DTYPES[trained].itemsize)
                state = _imported_state(described, source, name, words.sha256, trained)
                _write_checkpoint(aside, folder, hf.DTYPES[trained], state)
            record.files(aside, path, weights)
            stored = StoredWeights(aside)
            stored.require(weights)
            windows = _windows(words, text, described)
            say(f"comparing with the trainer's model in fp32, window length {windows[0].size(1)}")
            with record.timed("comparing"):
                ours = trainer_model(described, stored.read)
                _require_agreement(
                    ours, transformers_model(folder), windows, f"importing {source}", record, say
                )
    assert record.agreement is not None
    say(f"wrote {out} ({trained}): {record.agreement.describe()}")
    return record.agreement


def _write_checkpoint(aside: Path, folder: HfFolder, dtype: torch.dtype, state: dict[str, Any]) -> None:
    """All that makes a folder a checkpoint; beside what lies there already."""
    model = folder.described.model
    weights = {weight.megatron: weight for weight in weight_map(model)}
    written = dist.write_weights(
        aside, list(weights.values()), model.layers, dtype, lambda name: folder.trainer_tensor(weights[name])
    )
    on_disk.write_json(aside / on_disk.STATE, {"format": on_disk.FORMAT, **state})
    names = {str(file.relative_to(aside)) for file in aside.rglob("*") if file.is_file()}
    files = written | on_disk.describe_files(aside, sorted(names - written.keys()))
    complete = {"format": on_disk.FORMAT, "files": dict(sorted(files.items()))}
    on_disk.write_json(aside / on_disk.COMPLETE, complete)


# --- what a checkpoint says of its model -------------------------------------------------------------------


def _describe(checkpoint: Checkpoint, rope_interleaved: bool) -> tuple[Description, str]:
    """The model as config.json will have it (special ids apart), and the dtype of the stored weights."""
    state = checkpoint.state
    try:
        model = Model(**state["model"])
        stages = state["ledger"]["stages"]
        longest = max(int(state["seq_length"]), *(int(stage["seq_length"]) for stage in stages), 0)
        interleaved = rope_interleaved or bool(state.get("rope_interleaved", False))
        described = Description(model, float(state["rope_base"]), longest, {}, interleaved)
        trained = "bf16" if precision(state["precision"]).bf16 else "fp32"
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/{on_disk.STATE} lacks what an export needs: {error!r}"
        ) from error
    return described, trained


def _with_special_ids(described: Description, state: dict[str, Any], words: Tokenizer) -> Description:
    """As imported; else as SmolLM2's base models: begin and end of text are the same token."""
    end = words.eod_id
    special = state.get("special_ids") or {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    return replace(described, special_ids=special)


def _imported_state(
    described: Description, source: str, tokenizer: str, sha256: str, dtype: str
) -> dict[str, Any]:
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
        "rope_interleaved": described.rope_interleaved,
        "tokenizer": tokenizer,
        "tokenizer_sha256": sha256,
        "special_ids": described.special_ids,
        "sizes": {},
        "layout": {"tp": 1, "pp": 1, "dp": 1},
        "ledger": Ledger({}).to_json(),
        "hooks": {},
        "versions": versions(),
    }


def _open_tokenizer(name: str, model: Model, sha256: str | None) -> Tokenizer:
    """sha256: identity of the tokenizer that the model was trained with, when that is known."""
    try:
        words = load_tokenizer(name)
    except UserError as error:
        raise type(error)(f"{error} (with --tokenizer you can name another place)") from error
    if words.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"tokenizer {name} has {words.vocab_size:,} ids and the model's vocabulary {model.vocab_size:,}: "
            "it is another model's; name the right one with --tokenizer"
        )
    if sha256 not in (None, words.sha256):
        raise CheckpointError(
            f"tokenizer {name} (vocabulary {words.vocab_size:,}, {words.sha256[:12]}) is not the one that the model "
            f"was trained with ({str(sha256)[:12]}); name that one with --tokenizer, or leave the option out"
        )
    return words


def known_tokenizer_sha256(state: dict[str, Any]) -> str | None:
    """Identity of the tokenizer of state.json, as recorded or as it still lies there; None when it is gone."""
    if known := state.get("tokenizer_sha256"):
        return str(known)
    try:
        return load_tokenizer(state["tokenizer"]).sha256
    except UserError:
        return None


def _lasting_name(source: str) -> str:
    """A hub name as it is; a folder by its full path, so that it is found from anywhere."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


# --- circumstances -----------------------------------------------------------------------------------------


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
    # Said aloud, a number of threads is kept: else MKL may take fewer, and products of few rows add up in another order.
    torch.set_num_threads(torch.get_num_threads())
    seed_random_streams(0)


def _windows(words: Tokenizer, text: Path | None, described: Description) -> list[Tensor]:
    try:
        content = TEXT if text is None else text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {text} cannot be read as text: {error}") from error
    return text_windows(words.encode_batch([content])[0].tolist(), described.seq_length)
