"""Numbers that go wrong: the hook that looks at each step's loss and gradient norm before the optimizer does.

All ranks hold the same two numbers, so all decide alike, without asking each other. What is not finite is never
applied. What is decided (recipe: `guard`) becomes a row of incidents.jsonl and a line of the log; what must not be forgotten is
in every checkpoint, and in the rows of roll-backs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_smol.checkpoint.agree import together
from megatron_smol.errors import RunError, UserError, nearest
from megatron_smol.recipe.plan import StagePlan
from megatron_smol.recipe.schema import Guard as Settings
from megatron_smol.recipe.schema import Recipe
from megatron_smol.train.hooks import Hook, RollBack, StepDone
from megatron_smol.train.incidents import bad_gradients, documents_of, drop_undone, write_incident
from megatron_smol.train.pulse import SAVING
from megatron_smol.train.spikes import Window
from megatron_smol.train.step import StepResult

if TYPE_CHECKING:
    from megatron_smol.train.trainer import Trainer

# The least standard deviation of a logarithm that is believed. With six of them a loss is a spike from 1.06 times the usual
# on; a gradient norm, which clipping makes harmless and which varies by factors in small batches, from 6 times on.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.3


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step, in words and numbers, and what the recipe wants done."""

    what: str
    value: float
    policy: str
    median: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        usual = "" if self.limit is None else f" (usual {self.median:.4g}, limit {self.limit:.4g})"
        return f"{self.what} {self.value:.4g}{usual}"

    def numbers(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        known = {} if self.limit is None else {"median": self.median, "limit": self.limit}
        return {"what": self.what, "value": value, **known}


class Guard(Hook):
    """Skips, rolls back or stops, as the recipe's `guard` says; remembers what was skipped."""

    def __init__(self, recipe: Recipe) -> None:
        self._settings: Settings = recipe.guard
        size, sigmas = self._settings.history, self._settings.sigmas
        self._windows = {
            "loss": Window(size, sigmas, LOSS_FLOOR),
            "gradient norm": Window(size, sigmas, NORM_FLOOR),
        }
        self._in_a_row = self._total = 0
        self._skipped: list[list[Any]] = []  # [stage, first step, last step], what was read and not applied
        self._ahead: list[list[Any]] = []  # the same, of what is to be skipped after roll-backs
        spans_of = self._settings.skip_steps.items()
        self._listed = [[name, *span] for name, spans in spans_of for span in spans]
        self._rollbacks: dict[str, int] = {}  # by the checkpoint they went back to
        names = [stage.name for stage in recipe.stages]
        for name, spans in self._settings.skip_steps.items():
            if name not in names:
                raise UserError(
                    f"guard.skip_steps names stage '{name}', which is not in the recipe; {nearest(name, names)}"
                )
            for first, last in spans:
                if not 1 <= first <= last:
                    raise UserError(
                        f"guard.skip_steps.{name} has [{first}, {last}]; give first and last step, from 1 on"
                    )

    # --- what a run remembers -------------------------------------------------------------------------------

    def on_run_start(self, trainer: Trainer) -> None:
        found: list[Any] = [None]
        with together("reading incidents.jsonl", only_rank=0) as mine:
            if mine:
                found[0] = drop_undone(trainer.plan.recipe.run_path, trainer.state.progress)
        torch.distributed.broadcast_object_list(found, 0)
        gone_back = [row for row in found[0] if row["decision"] == "rollback"]
        self._rollbacks = {}
        for row in gone_back:
            self._rollbacks[row["to"]] = self._rollbacks.get(row["to"], 0) + 1
        self._ahead += [row["skip"] for row in gone_back if row["skip"] not in self._ahead]

    def state_dict(self) -> dict[str, Any]:
        return {
            "windows": {name: window.state() for name, window in self._windows.items()},
            "in_a_row": self._in_a_row,
            "total": self._total,
            "skipped": self._skipped,
            "ahead": self._ahead,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, window in self._windows.items():
            window.load(state.get("windows", {}).get(name, ()))
        self._in_a_row, self._total = state.get("in_a_row", 0), state.get("total", 0)
        self._skipped = [list(span) for span in state.get("skipped", ())]
        self._ahead = [list(span) for span in state.get("ahead", ())]

    def on_stage_start(self, trainer: Trainer, stage: StagePlan) -> None:
        for window in self._windows.values():  # another mixture or length has another loss
            window.clear()

    def on_step(self, trainer: Trainer, done: StepDone) -> None:
        if not done.result.applied:
            _extend(self._skipped, done.stage.name, done.step)

    def on_run_end(self, trainer: Trainer, finished: bool) -> None:
        if skipped := trainer.state.ledger.skipped_tokens():
            shares = ", ".join(f"{name} {tokens:,}" for name, tokens in skipped.items())
            trainer.say(f"read and not applied: {shares} tokens, in steps {_listed(self._skipped)}")

    # --- what is decided ------------------------------------------------------------------------------------

    def wants(self, trainer: Trainer, stage: StagePlan) -> bool:
        step = trainer.state.step + 1
        unwanted = [*self._ahead, *self._listed]
        return not any(name == stage.name and first <= step <= last for name, first, last in unwanted)

    def admits(self, trainer: Trainer, stage: StagePlan, result: StepResult) -> bool:
        finding = self._judge(result)
        if finding is None:
            self._in_a_row = 0
            return True
        return self._decide(trainer, stage, finding)

    def _judge(self, result: StepResult) -> Finding | None:
        """The first thing that is wrong. The values enter their windows where both are finite, whatever is decided."""
        seen = {"loss": result.loss, "gradient norm": result.grad_norm}
        for name, value in seen.items():
            if not math.isfinite(value):
                return Finding(f"{name}", value, self._settings.non_finite)
        if self._settings.spike == "off":
            return None
        finding = None
        for name, value in seen.items():
            usual = self._windows[name].usual()
            if finding is None and usual and value > usual.limit:
                finding = Finding(f"{name} spike", value, self._settings.spike, usual.median, usual.limit)
            self._windows[name].add(value)
        return finding

    def _decide(self, trainer: Trainer, stage: StagePlan, finding: Finding) -> bool:
        """Carry the policy out, within its limits: True to apply the step, False to skip it, or an exception."""
        step, more = trainer.state.step + 1, {}
        if not math.isfinite(finding.value):
            more = {"gradients": bad_gradients(trainer.engine)}
        where = f"step {step} of '{stage.name}': {finding}{_culprits(more.get('gradients', ()))}"
        if finding.policy == "note":
            self._record(trainer, stage, finding, "note", f"{where}; noted, training goes on", more)
            return True
        self._in_a_row, self._total = self._in_a_row + 1, self._total + 1
        if too_many := self._too_many():
            self._stop(trainer, stage, finding, f"{where}; {too_many}", more)
        if finding.policy == "stop":
            self._stop(trainer, stage, finding, where, more)
        if finding.policy == "rollback" and (back := trainer.newest_checkpoint()):
            self._go_back(trainer, stage, finding, where, more, back.path)
        why = " (there is no checkpoint to go back to)" if finding.policy == "rollback" else ""
        self._record(trainer, stage, finding, "skip", f"{where}; its batch is not applied{why}", more)
        return False

    def _too_many(self) -> str:
        limits = self._settings
        if self._in_a_row > limits.max_in_a_row:
            return f"{self._in_a_row} incidents in a row, guard.max_in_a_row allows {limits.max_in_a_row}"
        total = self._total + sum(self._rollbacks.values())  # what a roll-back took back, it counts itself
        if total > limits.max_in_total:
            return f"{total} incidents, guard.max_in_total allows {limits.max_in_total}"
        return ""

    def _go_back(
        self, trainer: Trainer, stage: StagePlan, finding: Finding, where: str, more: Any, to: Path
    ) -> None:
        allowed, before = self._settings.max_rollbacks, self._rollbacks.get(to.name, 0)
        if before >= allowed:
            why = f"the run went back to {to.name} {before} times, guard.max_rollbacks allows {allowed}"
            self._stop(trainer, stage, finding, f"{where}; {why}", more)
        step = trainer.state.step + 1
        first = max(step - self._settings.skip_before, stage.start_step + 1)
        last = min(step + self._settings.skip_after, stage.end_step)
        reason = f"{where}; back to {to.name}, steps {first} to {last} of '{stage.name}' will not be applied"
        details = more | {"to": to.name, "skip": [stage.name, first, last]}
        self._record(trainer, stage, finding, "rollback", reason, details)
        raise RollBack(to)

    def _stop(self, trainer: Trainer, stage: StagePlan, finding: Finding, why: str, more: Any) -> None:
        """The last checkpoint is intact: nothing of this step was applied."""
        trainer.pulse.mark(SAVING)
        trainer.finish_saving()
        self._record(trainer, stage, finding, "stop", why, more)
        error = RunError(
            f"{why}; the last checkpoint is intact, and `smol inspect "
            f"{trainer.plan.recipe.run_path / 'recipe.yaml'} --step {trainer.state.step + 1} --stage {stage.name}` "
            "shows what was read. The recipe's guard section says what else may be done"
        )
        error.alike = True
        raise error

    def _record(
        self, trainer: Trainer, stage: StagePlan, finding: Finding, decision: str, reason: str, more: Any
    ) -> None:
        """One row and one line, on the disk before anything else happens; all ranks wait for it."""
        step = trainer.state.step + 1
        with together("writing incidents.jsonl", only_rank=0) as mine:
            if mine:
                place = {"stage": stage.name, "stage_index": stage.index, "step": step}
                told = {"decision": decision, "reason": reason}
                row = place | finding.numbers() | told | more
                row |= {"documents": documents_of(trainer, stage, step)}
                write_incident(trainer.plan.recipe.run_path, row)
        trainer.say(f"!! {reason}")


def _culprits(gradients: Any) -> str:
    """ ", not finite on rank 3 (node7): decoder... and 5 more"."""
    if not gradients:
        return ""
    said = []
    for entry in gradients[:3]:
        more = f" and {entry['count'] - 1} more" if entry["count"] > 1 else ""
        rank = "" if "origin" in entry else f"rank {entry['rank']} ({entry['host']}): "
        said.append(f"{rank}{entry['parameters'][0]}{more}")
    return f", gradients not finite on {'; '.join(said)}" + (" ..." if len(gradients) > 3 else "")


def _extend(spans: list[list[Any]], stage: str, step: int) -> None:
    """Add a step to a list of [stage, first, last]."""
    if spans and spans[-1][0] == stage and spans[-1][2] == step - 1:
        spans[-1][2] = step
    else:
        spans.append([stage, step, step])


def _listed(spans: list[list[Any]]) -> str:
    return ", ".join(
        f"{first} of '{stage}'" if first == last else f"{first} to {last} of '{stage}'"
        for stage, first, last in spans
    )
