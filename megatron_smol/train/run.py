"""`smol train`: put recipe, plan, data, model and hooks together, resume if there is something to resume.

The same command starts a run and continues it, on one process, under torchrun or under srun.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from rich.console import Console

from megatron_smol.checkpoint import folder
from megatron_smol.checkpoint.agree import together
from megatron_smol.data.loader import check_divisible, check_packed
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.data.tokenizer import load_tokenizer
from megatron_smol.errors import EXIT_RESTART_ME, DataError, DiskError, UserError, is_away
from megatron_smol.model.backend import backend
from megatron_smol.model.precision import precision
from megatron_smol.recipe.plan import Plan, make_plan
from megatron_smol.recipe.render import to_json
from megatron_smol.recipe.schema import Recipe
from megatron_smol.recipe.units import format_tokens
from megatron_smol.train.guard import Guard
from megatron_smol.train.hooks import Hook
from megatron_smol.train.lock import Claim, RunLock, take_lock
from megatron_smol.train.monitor import Metrics, StepLog
from megatron_smol.train.ownership import Ownership
from megatron_smol.train.pulse import Pulse
from megatron_smol.train.replicas import ReplicaCheck
from megatron_smol.train.signals import ASKED_BY_FILE, STOP_FILE, StopFlag
from megatron_smol.train.state import open_run_folder, versions, write_text
from megatron_smol.train.step import Engine, check_virtual_pipeline, init_parallel
from megatron_smol.train.stragglers import Stragglers
from megatron_smol.train.trainer import Trainer
from megatron_smol.train.validate import SourceValidation
from megatron_smol.train.watchdog import Watchdog

ERROR_CHARACTERS = 160  # of gloo's and NCCL's paragraphs, in the log's one line


def train(recipe: Recipe, stop: StopFlag) -> int:
    """Run or continue the recipe on this rank; returns the process's exit code.

    0: all stages are done. EXIT_RESTART_ME: a signal came, the run saved itself. Errors are raised.
    """
    for name in {recipe.training_of(stage).precision for stage in recipe.stages}:
        precision(name, recipe.fp8).require(backend())
    layout, pulse = recipe.parallel, Pulse()
    init_parallel(layout.tp, layout.pp, layout.cp, layout.vpp, recipe.guard.collective_timeout)
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
                f"stage '{stage.name}' sets document_mask, which was not yet shown to hold on a GPU with Transformer Engine "
                "(bench/gpu/PENDING.md); set document_mask: false"
            )
    lock: RunLock | None = None
    console = Console(soft_wrap=True, highlight=False)
    with together("opening the run folder", only_rank=0) as mine:
        if mine:
            lock = _prepare_folder(plan, lambda line: console.print(line, markup=False))
    claims = [lock.claim if lock else None]
    torch.distributed.broadcast_object_list(claims, 0)
    assert claims[0]
    ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with Watchdog(recipe.run_path, *ranks, pulse, recipe.guard, claims[0]) as watchdog:
        finished = _train_watched(plan, sources, stop, console, pulse, watchdog, claims[0])
        torch.distributed.destroy_process_group()
    if lock:
        lock.close()
    return 0 if finished else EXIT_RESTART_ME


def _train_watched(
    plan: Plan,
    sources: dict[str, TokenSource],
    stop: StopFlag,
    console: Console,
    pulse: Pulse,
    watchdog: Watchdog,
    claim: Claim,
) -> bool:
    """Build, resume, train; True when all stages are done. An error that another rank may have caused is explained."""
    recipe, first = plan.recipe, plan.stages[0]
    try:
        engine = Engine(recipe, first.seq_length, first.rope_base, first.precision)
        # What looks at a step comes before what writes it down.
        hooks: list[Hook] = [
            watchdog,
            Ownership(claim),
            Guard(recipe),
            Stragglers(recipe.guard),
            StepLog(console),
            Metrics(),
            SourceValidation(),
            ReplicaCheck(recipe.guard.replica_check),
        ]
        trainer = Trainer(plan, engine, sources, hooks, stop, console, pulse)
        with together("looking at the lock", only_rank=0) as mine:  # building may have taken long
            if mine:
                claim.require()
        _start_or_resume(trainer)
        finished = trainer.fit()
        _farewell(trainer, finished)
    except UserError:
        _require(
            claim
        )  # a save that failed because a later start cleared it away: that is the reason to tell
        raise
    except OSError as error:
        if not is_away(error):
            raise
        where = error.filename or recipe.run_path  # of what a run writes beside checkpoints
        raise DiskError(f"{where}: {error.strerror}; mend that, then run again") from error
    except RuntimeError as error:  # what torch raises when another rank is gone or does not answer
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        watchdog.explain(
            f"rank {torch.distributed.get_rank()} stopped at an error ({cause[:ERROR_CHARACTERS]})"
        )
        _require(claim)
        raise
    return finished


def _require(claim: Claim) -> None:
    """Of a folder that may itself be what failed."""
    with contextlib.suppress(OSError):
        claim.require()


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


def _prepare_folder(plan: Plan, say: Callable[[str], None]) -> RunLock:
    """Make the run folder this run's; returns its lock, held as long as the file is open."""
    recipe = plan.recipe
    try:
        folder.make_folder(recipe.run_path)
        lock = take_lock(recipe.run_path, say)
        open_run_folder(recipe)
        write_text(recipe.run_path / "plan.json", json.dumps(to_json(plan), indent=1) + "\n")
        write_text(recipe.run_path / "versions.json", json.dumps(_circumstances(), indent=1) + "\n")
    except OSError as error:
        kind = DiskError if is_away(error) else UserError
        raise kind(
            f"run_dir {recipe.run_path} cannot be written: {error.strerror}; mend that, or set run_dir elsewhere"
        ) from error
    folder.remove_unfinished(recipe.run_path / "checkpoints")
    return lock


def _circumstances() -> dict[str, str]:
    ranks = torch.distributed.get_world_size()
    return versions() | {"ranks": str(ranks), "device": backend().describe()}


def _start_or_resume(trainer: Trainer) -> None:
    """Go on from the newest whole checkpoint, or start; every rank follows rank 0's choice."""
    checkpoint = trainer.newest_checkpoint()
    world = torch.distributed.get_world_size()
    trainer.say(f"{world} rank{'s' if world > 1 else ''}: {backend().describe()}")
    if checkpoint is None:
        if trainer.plan.recipe.init_from:
            from megatron_smol.train.init_from import initialise

            initialise(trainer, trainer.plan.recipe.init_from)
        trainer.say(f"no checkpoint found: training starts at step {trainer.state.step}")
    else:
        trainer.resume(checkpoint)
        trainer.say(f"resumed from {checkpoint.path}")


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
