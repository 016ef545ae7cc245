"""From a run to the whole proposal: evidence, weights with their reasons in words, the changed recipe.

`view` prints it; `Proposal.to_json` is what `--json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from megatron_smol.ablate.results import LOSS
from megatron_smol.errors import DataError, UserError
from megatron_smol.rebalance.diff import flow_mixture, replace_mixture, unified
from megatron_smol.rebalance.evidence import AblationResult, Arm, Evidence
from megatron_smol.rebalance.law import Law, fit
from megatron_smol.rebalance.propose import Weight, effects_of, propose
from megatron_smol.rebalance.room import UNITS, Room, rooms, worst_epochs
from megatron_smol.rebalance.run import Subject
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.plan import Plan, make_plan


@dataclass(frozen=True)
class Fitted:
    """A mixture law of one metric of one ablation, and what it says of the planned and the proposed mixture."""

    ablation: str
    metric: str
    law: Law
    planned: float
    proposed: float
    inside: bool  # whether the arms have covered the proposed weights


@dataclass(frozen=True)
class Line:
    """One source of the proposal. Weights are shares of the stage; epochs_after: of the lineage that reads it most."""

    source: str
    planned: float
    proposed: float
    highest: float
    epochs_after: float
    cap: float
    basis: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    subject: Subject
    evidence: Evidence
    lines: tuple[Line, ...]
    laws: tuple[Fitted, ...]
    notes: tuple[str, ...]
    units: dict[str, int]
    diff: str

    @property
    def override(self) -> str | None:
        """For the command line; None for a stage that the recipe does not have yet."""
        if self.subject.is_new:
            return None
        return f"stages.{self.subject.stage.name}.mixture={flow_mixture(self.units)}"

    def to_json(self) -> dict[str, Any]:
        stage = self.subject.stage
        return {
            "run": str(self.subject.folder),
            "stage": stage.name,
            "stage_tokens": stage.tokens,
            "sources": {line.source: asdict(line) for line in self.lines},
            "ablations": [
                {**asdict(own), "folder": str(own.folder)} for own in self.evidence.ablations
            ],
            "laws": [
                {
                    "ablation": own.ablation, "metric": own.metric, "kind": own.law.kind, "arms": own.law.arms,
                    "left_out_error": own.law.left_out_error, "mean_error": own.law.mean_error, "holds": own.law.holds,
                    "planned": own.planned, "proposed": own.proposed, "inside": own.inside,
                }
                for own in self.laws
            ],
            "evaluations": [asdict(own) for own in self.evidence.evaluations],
            "validation": [{"stage": stage, "losses": losses} for stage, losses in self.evidence.validation],
            "notes": self.notes,
            "override": self.override,
            "diff": self.diff,
        }  # fmt: skip


def make_proposal(subject: Subject, evidence: Evidence, step: float) -> Proposal:
    """Raises DataError when nothing was measured that could tell, UserError when the caps leave no mixture."""
    if not evidence.ablations and not evidence.evaluations:
        raise DataError(
            f"no weight of stage '{subject.stage.name}' can be argued for: {subject.folder} has no evaluations, and no ablation "
            "has started from it. Its validation losses alone do not tell which source did what. Run one: smol ablate CONFIG "
            "(from: this run), or smol eval RUN --stages --suite NAME, then ask again"
        )
    plan, stage = subject.plan, subject.stage
    room, effects = rooms(plan, stage), effects_of(evidence.ablations)
    unknown = [name for name in effects if name not in room]
    weights = propose(stage.weights, room, effects, step)
    units = {name: weight.proposed for name, weight in weights.items()}
    text = replace_mixture(subject.text, stage.name, units)
    changed = parse_recipe(text, str(subject.recipe_path))
    after = make_plan(changed, plan.sizes)
    _require_faithful(after, stage.name, units)
    epochs = worst_epochs(after, after.stage(stage.name))
    notes = [
        *_notes(subject, evidence, after),
        *(f"'{n}' of an ablation is no source of the recipe" for n in unknown),
    ]
    return Proposal(
        subject,
        evidence,
        tuple(_line(name, own, room[name], epochs[name]) for name, own in weights.items()),
        tuple(_laws(evidence, stage.weights, units)),
        tuple(notes),
        units,
        unified(subject.original, text, str(subject.recipe_path)),
    )


def _require_faithful(after: Plan, stage: str, units: Mapping[str, int]) -> None:
    """The text that was made says what was proposed, and the plan's own epochs keep every cap."""
    planned = after.stage(stage)
    wanted = {name: Fraction(count, UNITS) for name, count in units.items() if count}
    if planned.weights != wanted:
        raise UserError(
            f"the mixture of stage '{stage}' is written in a way that cannot be changed line by line; write it as "
            f"mixture: {flow_mixture(units)} yourself"
        )
    epochs = worst_epochs(after, planned)
    for name in wanted:
        cap = after.recipe.sources[name].max_epochs
        if cap is not None and epochs[name] > cap:
            raise UserError(
                f"with the proposal source '{name}' is read {epochs[name]:.2f} times, above its max_epochs of {cap:g}: another "
                f"stage shares the mixture of '{stage}' through an anchor (&) of the recipe; write that one out first"
            )


def _line(name: str, weight: Weight, room: Room, epochs: float) -> Line:
    return Line(
        name,
        weight.planned / UNITS,
        weight.proposed / UNITS,
        room.highest / UNITS,
        epochs,
        room.cap,
        weight.basis,
        tuple(_reasons(weight, room)),
    )


def _reasons(weight: Weight, room: Room) -> list[str]:
    reasons = []
    if weight.basis == "cap":
        limit = f"its max_epochs of {room.cap:g}"
        if not room.declared:
            limit = f"the customary limit of {room.cap:g} epochs (it has no max_epochs)"
        reasons.append(
            f"fixed by a cap: {weight.wanted:.2%} was wanted, {limit} leaves {room.highest / UNITS:.2%}, "
            f"{room.epochs_elsewhere:.2f} epochs being read in other stages"
        )
    if weight.effect is not None:
        reasons += [_told(ablation, arm) for ablation, arm in weight.effect.arms]
        if not weight.effect.clear:
            reasons.append("not told from noise: it keeps its proportion of the rest, a guess")
    elif weight.basis == "guess":
        reasons.append("a guess: no ablation tried it; it keeps its proportion of the rest")
    return reasons


def _told(ablation: AblationResult, arm: Arm) -> str:
    error = "" if arm.difference_error is None else f" ± {arm.difference_error:.4f}"
    p = "one seed, no error" if arm.p is None else "p < 0.0001" if arm.p < 1e-4 else f"p = {arm.p:.4f}"
    share = "" if arm.share is None else f" at a share of {arm.share:g}"
    effect = "better" if arm.improvement > 0 else "worse"
    return (
        f"{effect}: '{arm.candidate}'{share} changed {ablation.rank_by} by {arm.difference:+.4f}{error} against the running "
        f"mixture ({p}; {ablation.name})"
    )


def _laws(evidence: Evidence, planned: Mapping[str, Fraction], units: Mapping[str, int]) -> list[Fitted]:
    """Of every loss, and of what the ablation ranked by, where there are arms enough."""
    found = []
    before = {name: float(weight) for name, weight in planned.items()}
    after = {name: count / UNITS for name, count in units.items()}
    for ablation in evidence.ablations:
        metrics = dict.fromkeys(m for _, own in ablation.means for m in own)
        for metric in (m for m in metrics if m.startswith(LOSS) or m == ablation.rank_by):
            law = fit([(weights, own[metric]) for weights, own in ablation.means if metric in own])
            if law is not None:
                said = law.predict(before), law.predict(after)
                found.append(Fitted(ablation.name, metric, law, *said, law.has_seen(after)))
    return found


def _notes(subject: Subject, evidence: Evidence, after: Plan) -> list[str]:
    notes = []
    if not evidence.ablations:
        notes.append(
            "no ablation has started from this run: the weights are the planned ones within the caps, and all of them are "
            "guesses; evaluations say where the model is weak, not which source would help"
        )
    elif not any(effect.clear for effect in effects_of(evidence.ablations).values()):
        for own in (own for own in evidence.ablations if not own.arms):
            notes.append(f"{own.name} has no control: it ranks its candidates, and not the running mixture")
        notes.append("no ablation could tell a candidate from noise: more seeds, or a longer budget, would")
    measures = dict.fromkeys(own.rank_by for own in evidence.ablations)
    if measures:
        notes.append(
            f"better and worse mean {', '.join(measures)} and nothing else; see the other losses before you agree"
        )
    if not evidence.evaluations:
        notes.append("no evaluation of a stage end: smol eval RUN --stages --suite NAME would add them")
    for task in evidence.evaluations:
        if task.change is not None and task.change.verdict == "worse":
            notes.append(
                f"{task.task} ({task.category}) fell by {task.change.a - task.change.b:.4f} ± {task.change.stderr:.4f} over "
                f"stage '{task.stage}'; mixture, tokens and LR changed at once, so that the cause is a guess"
            )
    for stage in subject.plan.stages:
        if stage.name != subject.stage.name and stage.weights != after.stage(stage.name).weights:
            notes.append(
                f"stage '{stage.name}' shares the mixture through an anchor (&) of the recipe and changes with it"
            )
    return notes
