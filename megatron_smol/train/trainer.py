"""The training loop: stages in order, steps inside a stage, a checkpoint where the plan asks for one.

Everything it needs to know is decided before: what happens at each step by the plan, what each step reads by
the data order. Whatever is optional is a hook.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from rich.console import Console

from megatron_smol.checkpoint import folder, store
from megatron_smol.checkpoint.agree import together
from megatron_smol.checkpoint.saving import Saving
from megatron_smol.checkpoint.staging import Staging
from megatron_smol.data.ledger import Ledger
from megatron_smol.data.loader import GlobalBatch, Share, StageLoader
from megatron_smol.data.source import TokenSource
from megatron_smol.errors import CheckpointError
from megatron_smol.model.backend import backend
from megatron_smol.recipe.estimate import checkpoint_bytes
from megatron_smol.recipe.plan import Plan, StagePlan
from megatron_smol.train.hooks import Hook, RollBack, StepDone
from megatron_smol.train.pulse import (
    AGREEING,
    COMPUTING,
    LOADING,
    REPORTING,
    SAVING,
    STARTING,
    UPDATING,
    VALIDATING,
    Pulse,
)
from megatron_smol.train.signals import StopFlag
from megatron_smol.train.state import TrainState
from megatron_smol.train.step import SKIPPED, Engine, StepResult


class Trainer:
    """Carries a plan out on this rank. `state` is the only thing that moves."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        sources: Mapping[str, TokenSource],
        hooks: Sequence[Hook],
        stop: StopFlag,
        console: Console,
        pulse: Pulse,
    ) -> None:
        self.plan, self.engine, self.sources, self.hooks, self.stop = plan, engine, sources, hooks, stop
        self._console, self.pulse = console, pulse
        self.checkpoints = plan.recipe.run_path / "checkpoints"
        self.share = Share(
            parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        )
        self.data = {name: source.identity for name, source in sources.items()}
        manifests = (source.manifest for source in sources.values())
        # Every manifest was compared with the recipe's tokenizer; a bare Megatron prefix has none.
        self._tokenizer_sha256 = next((found.tokenizer.sha256 for found in manifests if found), None)
        self.state = TrainState(0, 0, Ledger.of(plan))
        self._staging = Staging()
        self._saving: Saving | None = None

    @property
    def stage(self) -> StagePlan:
        return self.plan.stages[self.state.stage_index]

    def say(self, line: str) -> None:
        """Tell the person who watches: rank 0's terminal and log.txt."""
        if torch.distributed.get_rank() == 0:
            self._console.print(line, markup=False)
            with (self.plan.recipe.run_path / "log.txt").open("a") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def fit(self) -> bool:
        """Train from where the state stands to the end; False when a signal stopped it (after a save)."""
        finished: bool | None = None
        while finished is None:
            for hook in self.hooks:
                hook.on_run_start(self)
            try:
                finished = all(self._run_stage(stage) for stage in self.plan.stages[self.state.stage_index :])
            except RollBack as back:
                to = back.checkpoint
            if finished is None:
                self.resume(folder.read_checkpoint(to))
                self.say(f"back at {to}")
        self.pulse.mark(SAVING)
        self.finish_saving()
        for hook in self.hooks:
            hook.on_run_end(self, finished)
        return finished

    def newest_checkpoint(self) -> folder.Checkpoint | None:
        """The newest whole one, the same on all ranks; waits for a save under way.

        Clears what a kill between publishing and pruning left: the next save must find the room it was promised.
        """
        self.pulse.mark(STARTING)
        self.finish_saving()
        chosen: list[str | None] = [None]
        with together("looking for a checkpoint", only_rank=0) as mine:
            if mine and (found := folder.choose_newest(self.checkpoints, warn=self.say)):
                chosen[0] = str(found.path)
                self._remove_old_checkpoints()
        torch.distributed.broadcast_object_list(chosen, 0)
        return folder.read_checkpoint(Path(chosen[0])) if chosen[0] else None

    def resume(self, checkpoint: folder.Checkpoint) -> None:
        """Take up the run where `checkpoint` left it, on this layout."""
        self.pulse.mark(STARTING)
        self.state = TrainState.from_checkpoint(checkpoint, self.plan, self.data)
        self._configure(self.stage)
        store.load(self.engine, checkpoint)
        for hook in self.hooks:
            hook.load_state_dict(self.state.hooks.get(type(hook).__name__, {}))

    def _run_stage(self, stage: StagePlan) -> bool:
        """Train (the rest of) one stage; False when stopped by a signal before all is done."""
        self.pulse.mark(STARTING)
        if stage.index != self.state.stage_index or self.state.progress == (0, 0):
            self._enter(stage)
        self.pulse.stage_index, self.pulse.step = self.state.progress
        self.pulse.mark(LOADING)
        loader = StageLoader(stage, self.plan.orders, self.sources, self.share, backend().device)
        for batch in loader.batches(self.state.step) if self.state.step < stage.end_step else ():
            self._step(stage, batch)
            self.finish_saving(wait=False)
            at_end = self.state.step == stage.end_step
            if at_end:
                self.pulse.mark(VALIDATING)
                self.state.ledger.check(self.plan, stage.name, stage.samples)
                for hook in self.hooks:
                    hook.on_stage_end(self, stage)
            self.pulse.mark(AGREEING)
            stopping = self.stop.agreed() and not (at_end and stage is self.plan.stages[-1])
            if stopping or self.stop.save_asked or self.plan.saves(stage.index, self.state.step):
                self.pulse.mark(SAVING)
                self.save()
            if stopping:
                return False
            self.pulse.mark(LOADING)
        return True

    def _step(self, stage: StagePlan, batch: GlobalBatch) -> None:
        started = time.perf_counter()
        waited = self.pulse.mark(COMPUTING)
        lr = self.plan.lr(stage.index, self.state.step)
        if all(hook.wants(self, stage) for hook in self.hooks):
            result = self.engine.train_step(batch.micro_batches, lr, self._admits)
        else:
            result = SKIPPED
        self.pulse.mark(REPORTING)
        self.state.step += 1
        self.state.ledger.add(stage.name, stage.seq_length, batch.rows, result.applied)
        # Waiting for the batch is part of the step: tokens/s and MFU fall where storage is slow.
        seconds, own = waited + time.perf_counter() - started, waited + result.own_seconds
        done = StepDone(stage, self.state.step, lr, result, batch.rows, seconds, own)
        for hook in self.hooks:
            hook.on_step(self, done)
        self.pulse.step = self.state.step

    def _admits(self, result: StepResult) -> bool:
        admitted = all(hook.admits(self, self.stage, result) for hook in self.hooks)
        self.pulse.mark(UPDATING)
        return admitted

    def _enter(self, stage: StagePlan) -> None:
        """Begin a stage where its parent stands: change what changes, and go back if it is a branch.

        A branch starts from the parent's checkpoint at the branch point, and so does the trunk after a
        branch. A change of precision is a new model and optimizer, filled from the same checkpoint.
        """
        rebuilt = self._configure(stage)
        if stage.parent is not None and (rebuilt or self._here() != (stage.parent, stage.start_step)):
            self.finish_saving()
            checkpoint = self._starting_point(stage.name, stage.parent, stage.start_step)
            self.state = TrainState.from_checkpoint(checkpoint, self.plan, self.data)
            store.load(self.engine, checkpoint)
        self.state.stage_index = stage.index
        self.pulse.mark(VALIDATING)
        for hook in self.hooks:
            hook.on_stage_start(self, stage)

    def _starting_point(self, stage_name: str, parent: str, step: int) -> folder.Checkpoint:
        """The kept checkpoint that a stage starts from, verified."""
        path = self.checkpoints / folder.checkpoint_name(parent, step)
        with together(f"opening {path}", only_rank=0) as mine:
            if mine:
                try:
                    folder.verify_files(folder.read_checkpoint(path).path)
                except CheckpointError as error:
                    raise CheckpointError(
                        f"stage '{stage_name}' starts from {path}, which cannot be used: {error}; restore it, or remove "
                        f"the checkpoints of '{parent}' from step {step} on and all later ones to train that part again"
                    ) from error
        return folder.read_checkpoint(path)

    def _here(self) -> tuple[str, int]:
        return self.stage.name, self.state.step

    def _configure(self, stage: StagePlan) -> bool:
        """Give the engine the stage's length, RoPE base and precision; True when its weights must be loaded."""
        rebuild = stage.precision != self.engine.precision
        if rebuild:
            self.engine.rebuild(stage.precision)
        self.engine.configure(stage.seq_length, stage.rope_base)
        return rebuild

    def save(self) -> None:
        """Take a checkpoint of this moment; it is written beside training, or here (save.asynchronous)."""
        self.finish_saving()
        for hook in self.hooks:
            hook.before_save(self)
        self.state.hooks = {type(hook).__name__: hook.state_dict() for hook in self.hooks}
        path = self.checkpoints / folder.checkpoint_name(self.stage.name, self.state.step)
        recipe = self.plan.recipe
        names = ("tp", "pp", "vpp", "cp", "distributed_optimizer")
        layout = {name: getattr(recipe.parallel, name) for name in names} | {"dp": self.share.size}
        state = self.state.to_json(self.plan, layout, self.data, self._tokenizer_sha256)
        size_bytes = checkpoint_bytes(recipe.model, self.engine.precision)
        self._saving = store.begin_save(
            self.engine, path, state, size_bytes, self._staging, self._remove_old_checkpoints
        )
        if recipe.save.asynchronous:
            self.say(f"checkpoint of step {self.state.step} copied in {self._saving.stall_seconds:.2f} s")
        else:
            self.finish_saving()

    def finish_saving(self, wait: bool = True) -> None:
        """Wait for the checkpoint under way, if there is one, or see whether all ranks have written it (`wait` false).

        Collective, at the same step on all ranks. Raises CheckpointError on all of them when a rank failed to write.
        """
        saving = self._saving
        if saving is None:
            return
        self._saving = None  # whatever comes, it is not asked again
        if not saving.finish(wait):
            self._saving = saving
            return
        for hook in self.hooks:
            hook.on_saved(self, str(saving.path))

    def _remove_old_checkpoints(self) -> None:
        folder.prune(self.checkpoints, self.plan.recipe.save.keep_last, self._kept_for_good)

    def _kept_for_good(self, checkpoint: folder.Checkpoint) -> bool:
        return self.plan.keeps(self.plan.stage(checkpoint.stage).index, checkpoint.step)
