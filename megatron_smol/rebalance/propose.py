"""The proposal: weights of the next stage from the planned ones, what ablations showed, and the caps.

The rule, which a reader can follow by hand: the source that helped most, by its ablation, gains `step`, the others that
helped gain in proportion to their effect; those that harmed lose likewise; whatever nothing was shown of shares the rest in
the proportions of the plan. No weight passes its cap; what a cap refuses goes to the untested sources, then to those that
helped, then to the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_smol.errors import UserError
from megatron_smol.rebalance.evidence import AblationResult, Arm
from megatron_smol.rebalance.room import UNITS, Room

_ROUNDING = 1e-12
Basis = Literal["ablation", "cap", "guess"]


@dataclass(frozen=True)
class Effect:
    """Of one source: relative improvement of the ablations' measure per unit of weight, its standard error, and the arms it
    comes from. Clear: every arm at the largest share differs from the control by more than noise."""

    improvement: float
    error: float | None
    clear: bool
    arms: tuple[tuple[AblationResult, Arm], ...]


@dataclass(frozen=True)
class Weight:
    """One source, in units of 1 / UNITS. wanted: what the evidence asks for before caps and rounding."""

    planned: int
    proposed: int
    wanted: float
    basis: Basis
    effect: Effect | None


def effects_of(ablations: Sequence[AblationResult]) -> dict[str, Effect]:
    """By source that a candidate brought in. Ablations count alike; within one, shares by what they tell."""
    found: dict[str, list[Effect]] = {}
    for ablation in ablations:
        for candidate in dict.fromkeys(arm.candidate for arm in ablation.arms):
            arms = [arm for arm in ablation.arms if arm.candidate == candidate]
            for source in _brought_in(arms):
                found.setdefault(source, []).append(_effect(ablation, arms, source))
    return {source: _mean(own) for source, own in found.items()}


def _brought_in(arms: Sequence[Arm]) -> list[str]:
    return [source for source, shift in arms[0].shift.items() if shift > 0]


def _effect(ablation: AblationResult, arms: list[Arm], source: str) -> Effect:
    """Least squares through the control over the shares; a candidate of several sources says the same of each."""
    shifts = [sum(shift for shift in arm.shift.values() if shift > 0) for arm in arms]
    norm = sum(shift**2 for shift in shifts)
    slope = sum(shift * arm.improvement for shift, arm in zip(shifts, arms, strict=True)) / norm
    errors = [arm.error for arm in arms if arm.error is not None]
    error = max(errors) / math.sqrt(norm) if errors else None
    largest = max(arms, key=lambda arm: arm.share or 0.0)
    return Effect(
        slope, error, largest.is_clear, tuple((ablation, arm) for arm in arms if source in arm.shift)
    )


def _mean(effects: list[Effect]) -> Effect:
    """Of several ablations; clear only when each is."""
    count = len(effects)
    errors = [effect.error for effect in effects if effect.error is not None]
    error = math.sqrt(sum(error**2 for error in errors)) / count if len(errors) == count else None
    return Effect(
        sum(effect.improvement for effect in effects) / count,
        error,
        all(effect.clear for effect in effects),
        tuple(arm for effect in effects for arm in effect.arms),
    )


def propose(
    planned: Mapping[str, Fraction],
    rooms: Mapping[str, Room],
    effects: Mapping[str, Effect],
    step: float,
) -> dict[str, Weight]:
    """Weights of every source of the recipe that has one or gets one; their units sum to UNITS, none above its room.

    Raises UserError when the caps leave no mixture at all.
    """
    start = {name: float(planned.get(name, 0)) for name in rooms}
    highest = {name: room.highest / UNITS for name, room in rooms.items()}
    moves = _moves(start, effects, step)
    wanted = _wanted(start, moves)
    free = [name for name in start if start[name] > 0 and name not in moves]
    helped = [name for name, move in moves.items() if move > 0]
    tiers = [free, helped, [name for name in start if start[name] > 0], list(effects)]
    _require_room(tiers, rooms)
    units = _to_units(_within(wanted, highest, tiers), rooms)
    return {
        name: Weight(
            round(start[name] * UNITS),
            units[name],
            wanted[name],
            _basis(units[name], wanted[name], rooms[name], name in moves),
            effects.get(name),
        )
        for name in rooms
        if units[name] or start[name] > 0 or name in effects
    }


def _moves(start: Mapping[str, float], effects: Mapping[str, Effect], step: float) -> dict[str, float]:
    """Changes of weight that clear effects ask for; gains shrink to what the others have to give."""
    clear = {name: own.improvement for name, own in effects.items() if own.clear and name in start}
    best = max([0.0, *clear.values()])
    worst = min([0.0, *clear.values()])
    moves = {
        name: step * gain / best if gain > 0 else -min(start[name], step * gain / worst)
        for name, gain in clear.items()
        if gain
    }
    asked = sum(move for move in moves.values() if move > 0)
    freed = -sum(move for move in moves.values() if move < 0)
    given = sum(weight for name, weight in start.items() if name not in moves)
    scale = min(1.0, (given + freed) / asked) if asked else 1.0
    return {name: move * scale if move > 0 else move for name, move in moves.items()}


def _wanted(start: Mapping[str, float], moves: Mapping[str, float]) -> dict[str, float]:
    """Planned and moved; the untested share what is left in their proportions."""
    moved = {name: start[name] + move for name, move in moves.items()}
    rest = 1 - sum(moved.values())
    untested = sum(weight for name, weight in start.items() if name not in moves)
    return {
        name: moved[name] if name in moved else weight * max(rest, 0.0) / untested if untested else 0.0
        for name, weight in start.items()
    }


def _require_room(tiers: Sequence[Sequence[str]], rooms: Mapping[str, Room]) -> None:
    allowed = dict.fromkeys(name for tier in tiers for name in tier)
    total = sum(rooms[name].highest for name in allowed if name in rooms)
    if total < UNITS:
        each = ", ".join(f"{name} {rooms[name].highest / UNITS:.2%}" for name in allowed if name in rooms)
        raise UserError(
            f"the epoch caps leave {total / UNITS:.2%} of the stage's tokens ({each}), so that no mixture of these sources "
            "keeps them; shorten the stage, raise a max_epochs, or add data"
        )


def _within(
    wanted: Mapping[str, float], highest: Mapping[str, float], tiers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Cut to the caps; what is missing to 1 is filled up tier by tier, in the proportions of what was wanted."""
    given = {name: min(weight, highest[name]) for name, weight in wanted.items()}
    for tier in tiers:
        while (
            missing := 1 - sum(given.values())
        ) > _ROUNDING:  # each pass fills it or brings a source to its cap
            open_ = [name for name in tier if name in given and highest[name] - given[name] > _ROUNDING]
            if not open_:
                break
            scale = sum(wanted[name] for name in open_)
            for name in open_:
                part = wanted[name] / scale if scale else 1 / len(open_)
                given[name] = min(highest[name], given[name] + missing * part)
    return given


def _to_units(weights: Mapping[str, float], rooms: Mapping[str, Room]) -> dict[str, int]:
    """Whole units that sum to UNITS: rounded down, then the largest remainders up, never above a room."""
    exact = {name: weight * UNITS for name, weight in weights.items()}
    units = {name: min(math.floor(value + 1e-6), rooms[name].highest) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: units[name] - exact[name])
    missing = UNITS - sum(units.values())
    for name in [n for n in by_remainder if exact[n] > 0 and units[n] < rooms[n].highest][:missing]:
        units[name] += 1
    assert sum(units.values()) == UNITS, "each source that was rounded down can take a unit"
    return units


def _basis(units: int, wanted: float, room: Room, moved: bool) -> Basis:
    if units == room.highest < math.floor(wanted * UNITS + 1e-6):
        return "cap"
    return "ablation" if moved else "guess"
