"""What a user should know about a plan before running it: epoch caps, unused sources, a rate gone to zero.

`plan.make_plan` asks for these last. A warning is printed; an error forbids the run
(`Plan.require_no_errors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_smol.recipe.units import format_tokens
from megatron_smol.train.schedule import WarmupStableDecay

if TYPE_CHECKING:
    from megatron_smol.recipe.plan import Plan

# Repeating data up to about four times costs little (Muennighoff et al. 2023); the SmolLM2 paper stays near
# 4-5.
EPOCHS_WORTH_A_WARNING = 4.0


@dataclass(frozen=True)
class Problem:
    """Something about a plan that a user should know before running it."""

    level: Literal["error", "warning"]
    message: str


def find_problems(plan: Plan) -> list[Problem]:
    """Everything worth saying about `plan`."""
    return [*_epoch_problems(plan), *_unused_sources(plan), *_lr_problems(plan)]


def _epoch_problems(plan: Plan) -> list[Problem]:
    """Sources that a lineage reads more often than allowed, each once: where it happens, and at its worst."""
    found = []
    for name, source in plan.recipe.sources.items():
        limit = EPOCHS_WORTH_A_WARNING if source.max_epochs is None else source.max_epochs
        epochs = {stage.name: plan.epochs(stage)[name] for stage in plan.stages}
        crossing = next((stage for stage, passes in epochs.items() if passes > limit), None)
        if crossing is None:
            continue
        worst = max(epochs, key=lambda stage: epochs[stage])
        read = (
            f"source '{name}' ({format_tokens(plan.sizes[name])} tokens) is read {epochs[crossing]:.2f} times"
        )
        read += f" by the end of '{crossing}'"
        later = "" if worst == crossing else f", and {epochs[worst]:.2f} times by the end of '{worst}'"
        if source.max_epochs is None:
            found.append(Problem("warning", f"{read}{later}; set its max_epochs if that is intended"))
            continue
        above = f"{read}, above its max_epochs of {limit:g}{later}"
        if plan.recipe.data.over_epochs == "warn":
            found.append(Problem("warning", above))
        else:
            advice = "add data, lower its weight, raise the cap, or set data.over_epochs: warn"
            found.append(Problem("error", f"{above}; {advice}"))
    return found


def _unused_sources(plan: Plan) -> list[Problem]:
    used = {name for stage in plan.stages for name in stage.weights}
    return [
        Problem("warning", f"source '{name}' is in no stage's mixture")
        for name in plan.sizes
        if name not in used
    ]


def _lr_problems(plan: Plan) -> list[Problem]:
    """Stages that train on after the rate has reached 0, and a decay that the trunk does not finish."""
    found = []
    for stage, schedule in zip(plan.stages, plan.schedules, strict=True):
        if not isinstance(schedule, WarmupStableDecay) or schedule.decay_start is None:
            continue
        end = schedule.decay_end
        assert end is not None, "a decay that starts also ends"
        dead = (stage.end_tokens - max(end, stage.start_tokens)) // stage.tokens_per_step
        if schedule.final == 0 and dead > 0:
            found.append(
                Problem(
                    "warning",
                    f"stage '{stage.name}' trains {dead:,} steps after the LR has reached 0; give it an "
                    "'lr' of its own",
                )
            )
        if stage is plan.trunk[-1] and end >= stage.end_tokens + stage.tokens_per_step:
            left = plan.lr(stage.index, stage.end_step)
            found.append(Problem("warning", f"the trunk ends before lr.decay_end, at an LR of {left:.3g}"))
    return found
