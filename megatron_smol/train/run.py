"""`smol train`: put recipe, plan, data, model and hooks together, resume if there is something to resume.

The same command starts a run and continues it, on one process, under torchrun or under srun.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import IO

import torch
from megatron.core import parallel_state
from rich.console import Console

from megatron_smol.checkpoint import folder
from megatron_smol.checkpoint.agree import together
from megatron_smol.data.loader import check_divisible, check_packed
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.data.tokenizer import load_tokenizer
from megatron_smol.errors import EXIT_RESTART_ME, DataError, UserError
from megatron_smol.model.backend import backend
from megatron_smol.model.precision import precision
from megatron_smol.recipe.plan import Plan, make_plan
from megatron_smol.recipe.render import to_json
from megatron_smol.recipe.schema import Recipe
from megatron_smol.recipe.units import format_tokens
from megatron_smol.train.monitor import Metrics, StepLog
from megatron_smol.train.signals import ASKED_BY_FILE, STOP_FILE, StopFlag
from megatron_smol.train.state import open_run_folder, versions, write_text
from megatron_smol.train.step import Engine, check_virtual_pipeline, init_parallel
from megatron_smol.train.trainer import Trainer
from megatron_smol.train.validate import SourceValidation


def train(recipe: Recipe, stop: StopFlag) -> int:
    """Run or continue the recipe on this rank; returns the process's exit code.

    0: all stages are done. EXIT_RESTART_ME: a signal came, the run saved itself. Errors are raised.
    """
    for name in {recipe.training_of(stage).precision for stage in recipe.stages}:
        precision(name).require(backend())
    layout = recipe.parallel
    init_parallel(layout.tp, layout.pp, layout.cp, layout.vpp)
    with together("opening the sources"):
        sources = open_sources(recipe)
    plan = make_plan(recipe, {name: source.tokens for name, source in sources.items()})
    plan.require_no_errors()
    for stage in plan.stages:
        check_divisible(stage, parallel_state.get_data_parallel_world_size())
        check_packed(stage, sources)
        check_virtual_pipeline(recipe.parallel, stage)
        if stage.document_mask and backend().transformer_engine:
            raise UserError(
                f"stage '{stage.name}' sets document_mask, which Transformer Engine's attention would ignore as it is "
                "called here; set document_mask: false"
            )
    lock: IO[str] | None = None
    with together("opening the run folder", only_rank=0) as mine:
        if mine:
            lock = _prepare_folder(plan)
    first = plan.stages[0]
    engine = Engine(recipe, first.seq_length, first.rope_base, first.precision)
    console = Console(soft_wrap=True, highlight=False)
    trainer = Trainer(plan, engine, sources, [StepLog(console), Metrics(), SourceValidation()], stop, console)
    _start_or_resume(trainer)
    finished = trainer.fit()
    _farewell(trainer, finished)
    torch.distributed.destroy_process_group()
    if lock:
        lock.close()
    return 0 if finished else EXIT_RESTART_ME


def open_sources(recipe: Recipe) -> dict[str, TokenSource]:
    """All sources of the recipe, checked against their manifests and the recipe's tokenizer."""
    tokenizer = load_tokenizer(recipe.tokenizer)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"tokenizer {recipe.tokenizer} has {tokenizer.vocab_size:,} ids, model.vocab_size is "
            f"{recipe.model.vocab_size:,}; set it to at least the tokenizer's"
        )
    sources = {name: load_source(source.path) for name, source in recipe.sources.items()}
    for source in sources.values():
        source.check_tokenizer(tokenizer)
    return sources


def _prepare_folder(plan: Plan) -> IO[str]:
    """Make the run folder this run's; returns its lock, held as long as the file is open."""
    recipe = plan.recipe
    try:
        recipe.run_path.mkdir(parents=True, exist_ok=True)
        lock = (recipe.run_path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another job is training in {recipe.run_path}; wait for it, or set another run_dir"
            ) from None
        open_run_folder(recipe)
        write_text(recipe.run_path / "plan.json", json.dumps(to_json(plan), indent=1) + "\n")
        write_text(recipe.run_path / "versions.json", json.dumps(_circumstances(), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"run_dir {recipe.run_path} cannot be written: {error.strerror}; set run_dir elsewhere"
        ) from error
    folder.remove_unfinished(recipe.run_path / "checkpoints")
    return lock


def _circumstances() -> dict[str, str]:
    ranks = torch.distributed.get_world_size()
    return versions() | {"ranks": str(ranks), "device": backend().describe()}


def _start_or_resume(trainer: Trainer) -> None:
    """Go on from the newest whole checkpoint, or start; every rank follows rank 0's choice."""
    chosen: list[str | None] = [None]
    with together("looking for a checkpoint", only_rank=0) as mine:
        if mine and (found := folder.choose_newest(trainer.checkpoints, warn=trainer.say)):
            chosen[0] = str(found.path)
    torch.distributed.broadcast_object_list(chosen, 0)
    world = torch.distributed.get_world_size()
    trainer.say(f"{world} rank{'s' if world > 1 else ''}: {backend().describe()}")
    if chosen[0] is None:
        if trainer.plan.recipe.init_from:
            from megatron_smol.train.init_from import initialise

            initialise(trainer, trainer.plan.recipe.init_from)
        trainer.say(f"no checkpoint found: training starts at step {trainer.state.step}")
    else:
        trainer.resume(folder.read_checkpoint(Path(chosen[0])))
        trainer.say(f"resumed from {chosen[0]}")


def _farewell(trainer: Trainer, finished: bool) -> None:
    tokens = trainer.state.ledger.consumed_tokens
    if finished:
        trainer.say(
            f"all {len(trainer.plan.stages)} stages are done; the ledger equals the plan, and the last lineage read "
            f"{format_tokens(tokens)} tokens"
        )
    else:
        trainer.say(
            f"stopped by {_who(trainer.stop)} at step {trainer.state.step} of "
            f"'{trainer.stage.name}', saved; the same command continues (exit code {EXIT_RESTART_ME})"
        )


def _who(stop: StopFlag) -> str:
    if stop.received == ASKED_BY_FILE:
        return f"the file {STOP_FILE} in the run folder"
    return f"signal {stop.received or 'of another rank'}"
