"""One recipe a run of an ablation: the base recipe up to the checkpoint, then one stage with the run's mixture.

A run begins as that checkpoint's continuation (`init_from: all`), so its ledger, and the epochs that its plan shows, are
those of the whole lineage. Seeds change the order of the data and, from scratch, the first weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_smol.ablate.config import CONTROL, Ablation, Start
from megatron_smol.errors import UserError
from megatron_smol.evals.suites import listed_tasks
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.mixture import mixture_text, resolve_mixture
from megatron_smol.recipe.plan import Plan, StagePlan, make_plan, resolve_sizes
from megatron_smol.recipe.schema import Recipe
from megatron_smol.recipe.units import Amount, round_half_up

STAGE = "ablation"
LOSS = "loss:"


@dataclass(frozen=True)
class Arm:
    """What is compared: a mixture over a budget. share: of the candidate; None: from scratch, or the control."""

    candidate: str
    share: float | None
    budget: Amount
    mixture: dict[str, Any]
    name: str


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: Arm
    seed: int
    recipe: Recipe
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def stage(self) -> StagePlan:
        return self.plan.stage(STAGE)

    def epochs(self) -> dict[str, float]:
        """Epochs of every source that the run reads, at its end."""
        found = self.plan.epochs(self.stage)
        return {name: found[name] for name in self.stage.weights}


def runs_of(config: Ablation) -> list[Run]:
    """All runs, planned. Raises UserError, as for a plan over its caps."""
    base = load_recipe(config.base, list(config.overrides))
    start = _starting_point(base, config.from_) if config.from_ else None
    made = []
    for arm in arms_of(config, start.stage.weights if start else None):
        for seed in config.seeds:
            recipe = Recipe.model_validate(_recipe(base, config, start, arm, seed))
            plan = make_plan(recipe, resolve_sizes(recipe))
            plan.require_no_errors()
            made.append(Run(arm, seed, recipe, plan))
    return made


def require_checkpoint(runs: list[Run]) -> None:
    """Raise UserError unless the checkpoint that the runs start from is there."""
    if (init := runs[0].recipe.init_from) is not None and not Path(init.path).is_dir():
        path = Path(init.path)
        stage = path.name.rpartition("-")[0]
        there = ", ".join(sorted(p.name for p in path.parent.glob(f"{stage}-*"))) or "none"
        raise UserError(f"there is no checkpoint {path}; of that stage there are: {there}")


def require_rank_by(config: Ablation, runs: list[Run]) -> None:
    """Raise UserError unless `rank_by` is something that the runs and `eval` will measure."""
    losses = [f"{LOSS}{name}" for name in ("mean", *runs[0].recipe.sources)]
    tasks = [item.label for item in listed_tasks(list(config.eval.tasks)).items] if config.eval else []
    if config.rank_by in losses or any(config.rank_by.startswith(f"{task}:") for task in tasks):
        return
    figures = (
        f"TASK:METRIC with a TASK of eval.tasks ({', '.join(tasks)})"
        if tasks
        else "with an `eval:` TASK:METRIC"
    )
    raise UserError(
        f"rank_by is '{config.rank_by}', which these runs do not measure; allowed: {', '.join(losses)}, and {figures}"
    )


@dataclass(frozen=True)
class _Checkpoint:
    stage: StagePlan
    step: int
    path: Path


def _starting_point(base: Recipe, start: Start) -> _Checkpoint:
    plan = make_plan(base, resolve_sizes(base))
    names = [stage.name for stage in plan.stages if not stage.is_branch]
    if start.stage not in names:
        raise UserError(f"the base recipe has no trunk stage '{start.stage}' (allowed: {', '.join(names)})")
    stage = plan.stage(start.stage)
    step = start.at.value if start.at.unit == "steps" else _saved_after(plan, stage, start.at.value)
    if not stage.start_step < step <= stage.end_step:
        raise UserError(
            f"from.at is step {step:,}, outside of stage '{stage.name}' (steps {stage.start_step:,} to {stage.end_step:,})"
        )
    return _Checkpoint(stage, step, start.run / "checkpoints" / f"{stage.name}-{step:08d}")


def _saved_after(plan: Plan, stage: StagePlan, tokens: int) -> int:
    """The first step of a stage at or after so many tokens that the run saves; its end, where the plan rounds them to that."""
    steps = Fraction(tokens - stage.start_tokens, stage.tokens_per_step)
    if stage.start_step + round_half_up(steps) == stage.end_step:
        return stage.end_step
    step = stage.start_step + math.ceil(steps)
    while stage.start_step < step < stage.end_step and not plan.saves(stage.index, step):
        step += 1
    return step


def arms_of(config: Ablation, running: Mapping[str, Fraction] | None) -> list[Arm]:
    """The grid: control and candidates x shares, each over every budget. running: None from scratch."""
    mixtures: list[tuple[str, float | None, dict[str, Any]]] = []
    if running is None:
        mixtures = [(name, None, mixture) for name, mixture in config.candidates.items()]
    else:
        rest = config.running or mixture_text(running)
        mixtures = [(CONTROL, None, rest)] if config.control else []
        for name, mixture in config.candidates.items():
            for part in config.shares:
                parts = {"candidate": {"weight": part, "of": mixture}}
                parts |= {} if part == 1 else {"running": {"weight": 1 - part, "of": rest}}
                mixtures.append((name, part, parts))
    arms = []
    for budget in config.budget:
        for candidate, share, mixture in mixtures:
            words = [candidate]
            words += [f"{share:g}"] if share is not None and len(config.shares) > 1 else []
            words += [str(budget)] if len(config.budget) > 1 else []
            arms.append(Arm(candidate, share, budget, mixture, " ".join(words)))
    return arms


def _recipe(base: Recipe, config: Ablation, start: _Checkpoint | None, arm: Arm, seed: int) -> dict[str, Any]:
    data = base.model_dump(mode="json", by_alias=True, exclude_none=True)
    unknown = [name for name in resolve_mixture(arm.mixture) if name not in base.sources]
    if unknown:
        raise UserError(
            f"'{arm.name}' names the source '{unknown[0]}', which {config.base} does not have; it has {', '.join(base.sources)}"
        )
    folder = arm.name.replace(" ", "-")
    data |= {
        "name": f"{config.name}-{folder}-{seed}",
        "run_dir": str(config.output.absolute() / folder / f"seed-{seed}"),
    }
    data["data"] |= {"seed": base.data.seed + seed, "page_length": f"{base.page_length}"}
    data.pop("tail", None)
    stage: dict[str, Any] = {"name": STAGE, "tokens": str(arm.budget), "mixture": arm.mixture}
    if start is None:
        data |= {"seed": base.seed + seed, "stages": [stage]}
        return data
    stages = []
    for own in data["stages"]:
        if own.get("from"):
            continue
        stages.append(own)
        if own["name"] == start.stage.name:
            own.pop("tokens", None)
            own["until"] = f"{start.step} steps"
            break
    settings = base.training_of(next(s for s in base.stages if s.name == start.stage.name))
    stage |= {
        name: getattr(settings, name)
        for name in ("seq_length", "rope_base", "global_batch", "micro_batch", "precision")
    }
    data["stages"] = [*stages, stage | {"lr": {"end": 0.0}}]
    data["init_from"] = {"path": str(start.path.absolute()), "what": "all"}
    for bound in ("decay_start", "decay_end"):  # they lie beyond, and this run has a decay of its own
        data["lr"].pop(bound, None)
    return data
