"""What the epoch caps leave for a stage: the highest weight of every source at which no lineage reads it too often.

The plan itself says what everything else reads: it is made twice with the stage's mixture replaced, so that each source is
once left out of it. What later stages and branches are planned to read is kept free for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from megatron_smol.recipe.plan import Plan, StagePlan, make_plan
from megatron_smol.recipe.problems import EPOCHS_WORTH_A_WARNING

UNITS = 10_000  # weights are whole ten-thousandths: readable, exact, and summing to 1
# In any prefix of a stage a source is within so many samples of weight x samples.
_BLEND_SLACK_SAMPLES = 2


@dataclass(frozen=True)
class Room:
    """One source. epochs_elsewhere: of the worst lineage through the stage, without the stage's own; cap in epochs: of the
    recipe, or the customary one (declared false); highest: weight in units."""

    epochs_elsewhere: float
    cap: float
    declared: bool
    highest: int


def rooms(plan: Plan, stage: StagePlan) -> dict[str, Room]:
    """By source of the recipe."""
    elsewhere = _epochs_elsewhere(plan, stage)
    planned = worst_epochs(plan, stage)
    return {name: _room(plan, stage, name, elsewhere[name], planned[name]) for name in plan.orders}


def with_mixture(plan: Plan, stage: StagePlan, weights: dict[str, Fraction]) -> Plan:
    """The same recipe with another mixture in one stage."""
    stages = tuple(
        own.model_copy(update={"mixture": weights}) if own.name == stage.name else own
        for own in plan.recipe.stages
    )
    return make_plan(plan.recipe.model_copy(update={"stages": stages}), plan.sizes)


def lineages_through(plan: Plan, stage: StagePlan) -> list[StagePlan]:
    """The stage, and every later stage and branch that goes on from it."""
    through = [stage.name]
    for later in plan.stages[stage.index + 1 :]:
        if later.parent in through:
            through.append(later.name)
    return [plan.stage(name) for name in through]


def worst_epochs(plan: Plan, stage: StagePlan) -> dict[str, float]:
    """Epochs of every source at the end of the lineage through the stage that reads it most."""
    ends = [plan.epochs(end) for end in lineages_through(plan, stage)]
    return {name: max(end[name] for end in ends) for name in plan.orders}


def _epochs_elsewhere(plan: Plan, stage: StagePlan) -> dict[str, float]:
    names = list(plan.orders)
    if len(names) == 1:
        return {
            names[0]: worst_epochs(plan, stage)[names[0]]
            - stage.tokens / plan.orders[names[0]].tokens_per_epoch
        }
    first, second = (
        worst_epochs(with_mixture(plan, stage, {name: Fraction(1)}), stage) for name in names[:2]
    )
    return {name: second[name] if name == names[0] else first[name] for name in names}


def _room(plan: Plan, stage: StagePlan, name: str, elsewhere: float, planned: float) -> Room:
    per_epoch = plan.orders[name].tokens_per_epoch
    declared = plan.recipe.sources[name].max_epochs
    cap = declared if declared is not None else max(EPOCHS_WORTH_A_WARNING, planned)
    windows = math.floor((cap - elsewhere) * per_epoch / stage.seq_length)
    share = Fraction(windows - _BLEND_SLACK_SAMPLES, stage.samples)
    highest = max(0, min(UNITS, math.floor(share * UNITS)))
    return Room(elsewhere, cap, declared is not None, highest)
