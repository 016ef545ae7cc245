"""What a person sees of SFT and DPO while they run: a line and a metrics row a step, a bar, TensorBoard.

A callback of transformers' Trainer, on the first rank. It also marks each checkpoint as written to the end,
and stops after a signal with everything saved.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from megatron_smol.data.files import write_whole
from megatron_smol.post.output import Output
from megatron_smol.report.collect import read_rows

# TRL's names -> ours. Losses in nats; margin and rewards in units of beta x nats; accuracies are shares.
_NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "num_tokens": "tokens",
    "mean_token_accuracy": "token_accuracy",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
}
_SHOWN = {"loss": "loss {:.4f}", "margin": "margin {:+.4f}", "accuracy": "accuracy {:.1%}"}


class Monitor(TrainerCallback):
    """metrics.jsonl (a row a step), validation.jsonl (held-out rows), TensorBoard, terminal."""

    def __init__(self, output: Output, title: str, console: Console, stop: Any) -> None:
        self._output, self._title, self._console, self._stop = output, title, console, stop
        self._board: Any = None
        self._bar: Progress | None = None
        self.stopped_by = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._first = state.global_step
        self._started = time.monotonic()
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._output.require()  # loading may have taken long
        rows = self._cut_back("metrics.jsonl", state.global_step)
        self._cut_back("validation.jsonl", state.global_step)
        # TRL counts a leg's tokens from 0.
        self._tokens_before = rows[-1]["tokens"] if rows else 0
        self._board = SummaryWriter(
            str(self._output.folder / "tensorboard"), purge_step=state.global_step + 1 if rows else 0
        )
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps, left"), TimeRemainingColumn())
            self._bar = Progress(TextColumn(self._title), *columns, console=self._console)
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def _cut_back(self, name: str, step: int) -> list[dict[str, Any]]:
        """Drop rows beyond the checkpoint; a fresh start keeps none."""
        path = self._output.folder / name
        rows = [row for row in read_rows(path) if 0 < step >= row["step"]]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or self._board is None:
            return
        self._output.require()
        if "eval_loss" in logs:
            self._write(
                "validation.jsonl", "heldout", state, {k.removeprefix("eval_"): v for k, v in logs.items()}
            )
        elif "loss" in logs:
            logs = {**logs, "num_tokens": int(logs.get("num_tokens", 0)) + self._tokens_before}
            self._write("metrics.jsonl", "train", state, logs)

    def _write(self, name: str, kind: str, state: Any, logs: dict[str, Any]) -> None:
        values = {ours: logs[theirs] for theirs, ours in _NAMES.items() if theirs in logs}
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **values}
        if kind == "train":
            row["seconds"] = round(time.monotonic() - self._step_started, 6)
        else:
            row.pop("tokens", None)  # of the training so far; a resumed leg would count from 0
        with (self._output.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{kind}/{key}", value, state.global_step)
        self._say(kind, state, row)

    def _say(self, kind: str, state: Any, row: dict[str, Any]) -> None:
        what = (
            f"{'step' if kind == 'train' else 'held-out, step':<14} {state.global_step:>5}/{state.max_steps}"
        )
        shown = [text.format(row[key]) for key, text in _SHOWN.items() if key in row]
        if kind == "train":
            per_step = (time.monotonic() - self._started) / max(1, state.global_step - self._first)
            left = timedelta(seconds=round(per_step * (state.max_steps - state.global_step)))
            shown += [f"lr {row['lr']:.2e}", f"grad {row.get('grad_norm', 0.0):.2f}", f"left {left}"]
        self._console.print(" | ".join([what, *shown]))
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if received := self._agreed(args):
            self.stopped_by = received
            control.should_save = control.should_training_stop = True

    def _agreed(self, args: Any) -> int:
        """The stop signal that any rank received, the same on all ranks; 0: none."""
        if args.world_size == 1:
            return int(self._stop.received)
        import torch

        flag = torch.tensor([self._stop.received], device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            import torch

            torch.distributed.barrier()  # every rank has written its part
        if state.is_world_process_zero:
            self._output.mark_complete(state.global_step)
            self._board.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def close(self) -> None:
        if self._board:
            self._board.close()
