"""What a person sees of a run: one line and one metrics row a step, a progress bar, TensorBoard.

metrics.jsonl and validation.jsonl are cut back to the checkpoint when a run resumes, so they never hold a
step twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from megatron_smol.checkpoint.folder import fsync
from megatron_smol.model.backend import backend
from megatron_smol.model.precision import precision
from megatron_smol.recipe.devices import device_by_cuda_name
from megatron_smol.recipe.estimate import flops_per_token
from megatron_smol.recipe.plan import StagePlan
from megatron_smol.recipe.units import format_tokens
from megatron_smol.train.hooks import Hook, StepDone
from megatron_smol.train.state import write_text

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer


class JsonLines:
    """An append-only file of rows that each carry "stage_index" and "step"."""

    def __init__(self, path: Path, progress: tuple[int, int]) -> None:
        """Open for appending (rank 0 only), dropping rows beyond `progress` and a half-written last row.

        A run without a checkpoint is at (0, 0) and starts over: nothing is kept.
        """
        self._file = None
        if torch.distributed.get_rank() == 0:
            cut_back(path, progress)
            self._file = path.open("a", buffering=1)
            fsync(path.parent)

    def write(self, row: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(row) + "\n")

    def flush_to_disk(self) -> None:
        """A checkpoint that outlives a power cut has its rows."""
        if self._file:
            os.fsync(self._file.fileno())


def cut_back(path: Path, progress: tuple[int, int], tail_bytes: int = 1 << 20) -> None:
    """Cut off the rows beyond `progress` at the end of a JSON-lines file, and a last line that a kill left torn.

    Only as much of the end is read as it takes: after millions of steps the file has gigabytes.
    """
    if not path.is_file():
        return
    size = path.stat().st_size
    with path.open("r+b") as file:
        while True:
            start = max(0, size - tail_bytes)
            file.seek(start)
            tail = file.read()
            keep = start + (tail.find(b"\n") + 1 if start else 0)  # the first line of the tail may be torn
            lines = tail[keep - start :].splitlines(keepends=True)
            kept = list(takewhile(lambda line: line.endswith(b"\n") and _within(line, progress), lines))
            if kept or start == 0:
                file.truncate(keep + sum(map(len, kept)))
                return
            tail_bytes *= 4


def _within(line: bytes, progress: tuple[int, int]) -> bool:
    """Whether a row lies at or before `progress`; at (0, 0) nothing was kept, so nothing is. A power cut leaves zeros, too."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return progress > (0, 0) and (row["stage_index"], row["step"]) <= progress


class Metrics(Hook):
    """metrics.jsonl, ledger.json and TensorBoard, written by rank 0.

    A step that was not applied has "applied": false, and NaN for what was not computed.
    """

    _board: SummaryWriter | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        folder = trainer.plan.recipe.run_path
        self._rows = JsonLines(folder / "metrics.jsonl", trainer.state.progress)
        if self._board:
            self._board.close()
        if torch.distributed.get_rank() == 0:
            self._step = _steps_done(trainer)  # counts on through branches, which repeat lineage steps
            self._board = SummaryWriter(folder / "tensorboard", purge_step=self._step + 1)
        self._write_ledger(trainer)

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        row: dict[str, Any] = {
            "stage": done.stage.name,
            "stage_index": done.stage.index,
            "step": done.step,
            "tokens": done.tokens,
            "loss": done.result.loss,
            "lr": done.lr,
            "grad_norm": done.result.grad_norm,
            "seq_length": done.stage.seq_length,
            "global_batch": done.stage.global_batch,
            "precision": done.stage.precision,
            "seconds": round(done.seconds, 6),
            "tokens_per_s": round(done.tokens_per_second, 1),
            "drawn": done.rows.counts(),
        }
        if not done.result.applied:
            row["applied"] = False
        self._rows.write(row)
        if self._board:
            self._step += 1
            scalars = {key: row[key] for key in ("loss", "lr", "grad_norm", "tokens_per_s")} | done.scalars
            for key, value in scalars.items():
                if math.isfinite(value):
                    self._board.add_scalar(f"{done.stage.name}/{key}", value, self._step)

    def before_save(self, trainer: Trainer) -> None:
        self._rows.flush_to_disk()

    def on_saved(self, trainer: Trainer, path: str) -> None:
        self._write_ledger(trainer)
        if self._board:
            self._board.flush()

    def _write_ledger(self, trainer: Trainer) -> None:
        if torch.distributed.get_rank() == 0:
            ledger = json.dumps(trainer.state.ledger.to_json(), indent=1)
            write_text(trainer.plan.recipe.run_path / "ledger.json", ledger + "\n")

    def on_run_end(self, trainer: Trainer, finished: bool) -> None:
        if self._board:
            self._board.close()


class StepLog(Hook):
    """One line a step on the terminal and in log.txt; a bar with what is left where there is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        if torch.distributed.get_rank() != 0:
            return
        self._done = _steps_done(trainer)
        self._total = sum(stage.steps for stage in trainer.plan.stages)
        self._started, self._first = time.monotonic(), self._done
        if self._bar:
            self._bar.stop()
        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps, left"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=self._console)
            self._task = self._bar.add_task("training", total=self._total, completed=self._done)
            self._bar.start()

    def on_stage_start(self, trainer: Trainer, stage: StagePlan) -> None:
        mixture = ", ".join(f"{name} {float(weight):.1%}" for name, weight in stage.weights.items())
        where = f"branches off {stage.parent}" if stage.is_branch else "begins"
        trainer.say(
            f"== {stage.name} {where} at step {stage.start_step}, {format_tokens(stage.start_tokens)} tokens: {mixture}; "
            f"length {stage.seq_length}, RoPE base {stage.rope_base:g}, batch {stage.global_batch}, {stage.precision}"
        )
        recipe = trainer.plan.recipe
        trainer.say(precision(stage.precision, recipe.fp8).describe(recipe.model.layers))

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        if torch.distributed.get_rank() != 0:
            return
        self._done += 1
        per_step = (time.monotonic() - self._started) / (self._done - self._first)
        left = timedelta(seconds=round(per_step * (self._total - self._done)))
        read = trainer.state.ledger.tokens()
        shares = " ".join(f"{name} {format_tokens(tokens)}" for name, tokens in read.items())
        mfu = _mfu(trainer, done)
        trainer.say(
            f"{done.stage.name:<14} step {done.step:>6}/{done.stage.end_step} | loss {done.result.loss:7.4f} | "
            f"lr {done.lr:.2e} | grad {done.result.grad_norm:6.2f} | {done.tokens_per_second:8,.0f} tokens/s{mfu} | "
            f"read {shares} | left {left}{'' if done.result.applied else ' | not applied'}"
        )
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=done.stage.name)

    def on_saved(self, trainer: Trainer, path: str) -> None:
        trainer.say(f"saved {path}")

    def on_run_end(self, trainer: Trainer, finished: bool) -> None:
        if self._bar:
            self._bar.stop()


def _steps_done(trainer: Trainer) -> int:
    """Steps of all stages up to where the run stands, for the bar: branches count from their own start."""
    before = sum(stage.steps for stage in trainer.plan.stages[: trainer.state.stage_index])
    return before + max(0, trainer.state.step - trainer.stage.start_step)


def _mfu(trainer: Trainer, done: StepDone) -> str:
    """Share of the GPU's dense bf16 peak, causal FLOP convention; empty where the peak is not known."""
    here = backend()
    if not here.on_gpu:
        return ""
    known = device_by_cuda_name(torch.cuda.get_device_name(here.device))
    if known is None:
        return ""
    flops = flops_per_token(trainer.plan.recipe.model, done.stage.seq_length) * done.tokens_per_second
    return f" | MFU {flops / (known.bf16_flops * torch.distributed.get_world_size()):.1%}"
