"""A recipe worked out to the step and the token, before any GPU is booked.

`make_plan` walks the stages in order and fixes what the whole run will do: where each stage starts and ends,
where every source stands, how many windows each gives, and the learning rate of every step. The data order,
the trainer, the ledger's check and `smol plan` all read this one result. Pure arithmetic: no torch, no files
except sizes of sources.

Rounding rule: a boundary given in tokens falls on the nearest whole step of the stage it lies in, halves
upwards. Steps and tokens are counted along a stage's lineage: the trunk up to its branch point, then the
branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from megatron_smol.data.blend import Blend
from megatron_smol.data.manifest import tokens_on_disk
from megatron_smol.data.order import Cursor, SourceOrder
from megatron_smol.data.stream import Stream
from megatron_smol.errors import UserError
from megatron_smol.recipe.problems import Problem, find_problems
from megatron_smol.recipe.schema import LearningRate, Recipe, Stage
from megatron_smol.recipe.units import Amount, format_tokens, round_half_up
from megatron_smol.train.schedule import Schedule, StageDecay, WarmupStableDecay

ROUNDING_RULE = (
    "a boundary given in tokens falls on the nearest whole step of the stage it lies in, halves upwards"
)


@dataclass(frozen=True)
class StagePlan:
    """One stage, worked out. Steps and tokens are those of its lineage."""

    index: int
    name: str
    parent: str | None
    is_branch: bool
    start_step: int
    end_step: int
    start_tokens: int
    end_tokens: int
    seq_length: int
    rope_base: float
    global_batch: int
    micro_batch: int
    precision: str
    document_mask: bool
    weights: dict[str, Fraction]
    cursors: dict[
        str, Cursor
    ]  # where every source of the recipe stands when the stage starts, after any skip
    draws: dict[str, int]  # windows that each source of the mixture gives in this stage
    skipped_tokens: dict[str, int]  # left unread at the start, because seq_length changed
    tokens_before: dict[str, int]  # read from every source of the recipe along the lineage, before this stage
    foreign_order: Stream | None = None  # in place of weights and cursors: the order of an older run

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    @property
    def tokens(self) -> int:
        return self.end_tokens - self.start_tokens

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_length

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch

    def tokens_at(self, step: int) -> int:
        """Lineage tokens consumed when `step` lineage steps are complete."""
        return self.start_tokens + (step - self.start_step) * self.tokens_per_step

    def tokens_drawn(self, source: str) -> int:
        """Tokens that this stage reads from `source`."""
        return self.draws.get(source, 0) * self.seq_length

    def tokens_after(self, source: str) -> int:
        """Tokens read from `source` along the lineage when the stage is complete."""
        return self.tokens_before[source] + self.tokens_drawn(source)


@dataclass(frozen=True)
class Plan:
    """The whole run. `sizes` are tokens per source; `orders` leave out the held-out end."""

    recipe: Recipe
    sizes: dict[str, int]
    orders: dict[str, SourceOrder]
    stages: tuple[StagePlan, ...]
    schedules: tuple[Schedule, ...]  # one per stage: the recipe's, or the stage's own
    problems: tuple[Problem, ...]

    def stage(self, name: str) -> StagePlan:
        """The stage of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(
            f"no stage is named '{name}'; allowed: {', '.join(stage.name for stage in self.stages)}"
        )

    @property
    def trunk(self) -> tuple[StagePlan, ...]:
        """The stages that are not branches, in order."""
        return tuple(stage for stage in self.stages if not stage.is_branch)

    def lr(self, stage_index: int, step: int) -> float:
        """The rate used by the step that starts when `step` lineage steps are complete."""
        return self.schedules[stage_index](self.stages[stage_index].tokens_at(step))

    def save_points(self) -> frozenset[tuple[str, int]]:
        """(stage, lineage step) where a branch starts: saved and kept, whatever the interval is."""
        return frozenset(
            (stage.parent, stage.start_step) for stage in self.stages if stage.is_branch and stage.parent
        )

    def keeps(self, stage_index: int, step: int) -> bool:
        """Whether the checkpoint after `step` is kept for good: a stage end, a branch point or one of save.keep_every."""
        stage = self.stages[stage_index]
        if step == stage.end_step or (stage.name, step) in self.save_points():
            return True
        every, spacing = self.recipe.save.every, self.recipe.save.keep_every
        if spacing is None or step % every:
            return False
        before = max(step - every, stage.start_step)
        return stage.tokens_at(step) // spacing > stage.tokens_at(before) // spacing

    def kept(self) -> set[tuple[str, int]]:
        """(stage, lineage step) of every checkpoint that is kept for good."""
        every = self.recipe.save.every
        found = set(self.save_points())
        for stage in self.stages:
            first = stage.start_step // every * every + every
            steps = (*range(first, stage.end_step, every), stage.end_step)
            found |= {(stage.name, step) for step in steps if self.keeps(stage.index, step)}
        return found

    def saves(self, stage_index: int, step: int) -> bool:
        """Whether a checkpoint is due after lineage step `step`."""
        return step % self.recipe.save.every == 0 or self.keeps(stage_index, step)

    def epochs(self, stage: StagePlan | None = None) -> dict[str, float]:
        """Passes over each source along `stage`'s lineage to its end; without a stage, the most of any."""
        if stage is not None:
            return {
                name: stage.tokens_after(name) / order.tokens_per_epoch for name, order in self.orders.items()
            }
        ends = [self.epochs(stage) for stage in self.stages]
        return {name: max(end[name] for end in ends) for name in self.orders}

    def require_no_errors(self) -> None:
        """Raise UserError for the first problem that forbids the run."""
        for problem in self.problems:
            if problem.level == "error":
                raise UserError(problem.message)


def make_plan(recipe: Recipe, sizes: Mapping[str, int] | None = None) -> Plan:
    """Work the recipe out. `sizes`: tokens per source; None takes the recipe's declared `tokens`."""
    known = _declared_sizes(recipe) if sizes is None else {name: int(sizes[name]) for name in recipe.sources}
    orders = {name: _order(recipe, name, tokens) for name, tokens in known.items()}
    stages: list[StagePlan] = []
    for stage in recipe.stages:
        stages.append(_plan_stage(recipe, stage, stages, orders))
    plan = Plan(recipe, known, orders, tuple(stages), _schedules(recipe, stages), ())
    return replace(plan, problems=(*find_problems(plan), *_held_out_problems(plan)))


def resolve_sizes(recipe: Recipe) -> dict[str, int]:
    """Tokens per source: from the files where they are on disk, else as declared."""
    sizes = {}
    for name, source in recipe.sources.items():
        size = tokens_on_disk(source.path)
        size = source.tokens if size is None else size
        if size is None:
            raise UserError(
                f"sources.{name} has no data at '{source.path}' and no 'tokens'; make the data with `smol "
                "preprocess`, or declare its size, such as tokens: 12B"
            )
        sizes[name] = size
    return sizes


def _declared_sizes(recipe: Recipe) -> dict[str, int]:
    sizes = {}
    for name, source in recipe.sources.items():
        if source.tokens is None:
            raise UserError(f"sources.{name} declares no 'tokens'; add its size, such as tokens: 12B")
        sizes[name] = source.tokens
    return sizes


def _order(recipe: Recipe, name: str, tokens: int) -> SourceOrder:
    holdout = recipe.data.holdout_tokens
    if tokens - holdout <= recipe.page_length:
        raise UserError(
            f"source '{name}' has {tokens:,} tokens; after {holdout:,} held-out tokens "
            f"(data.holdout_tokens) that is less than one page of {recipe.page_length:,} "
            "(data.page_length); add data, or lower one of the two"
        )
    return SourceOrder(name, tokens - holdout, recipe.page_length, recipe.data.seed)


def _plan_stage(
    recipe: Recipe, stage: Stage, before: list[StagePlan], orders: dict[str, SourceOrder]
) -> StagePlan:
    """Place `stage` behind its parent among the stages planned so far."""
    settings = recipe.training_of(stage)
    parent, start_step = _parent(stage, before)
    start_tokens = parent.tokens_at(start_step) if parent else 0
    steps = _steps(stage, start_step, start_tokens, settings.seq_length * settings.global_batch)
    cursors = (
        _cursors_at(parent, start_step, orders)
        if parent
        else {n: order.start() for n, order in orders.items()}
    )
    tokens_before = _tokens_at(parent, start_step, orders) if parent else dict.fromkeys(orders, 0)
    foreign, skipped = _foreign_order(recipe, stage), dict.fromkeys(stage.mixture, 0)
    for name in stage.mixture if foreign is None else ():
        cursors[name], skipped[name] = orders[name].enter(cursors[name], settings.seq_length)
    return StagePlan(
        index=len(before),
        name=stage.name,
        parent=parent.name if parent else None,
        is_branch=stage.from_ is not None,
        start_step=start_step,
        end_step=start_step + steps,
        start_tokens=start_tokens,
        end_tokens=start_tokens + steps * settings.seq_length * settings.global_batch,
        weights=dict(stage.mixture),
        cursors=cursors,
        draws=_draws(stage.mixture, foreign, steps * settings.global_batch),
        skipped_tokens=skipped,
        tokens_before=tokens_before,
        foreign_order=foreign,
        **settings.model_dump(),
    )


def _parent(stage: Stage, before: list[StagePlan]) -> tuple[StagePlan | None, int]:
    """The stage that this one continues, and the lineage step where it takes over."""
    if stage.from_ is None:
        trunk = [other for other in before if not other.is_branch]
        return (trunk[-1], trunk[-1].end_step) if trunk else (None, 0)
    parent = next(other for other in before if other.name == stage.from_.stage)
    back = stage.from_.before_end
    if back.unit == "steps":
        start_step = parent.end_step - back.value
    else:
        kept = parent.tokens - back.value
        start_step = parent.start_step + round_half_up(Fraction(kept, parent.tokens_per_step))
    if start_step <= parent.start_step:
        raise UserError(
            f"stages.{stage.name}.from.before_end is {back}, but stage '{parent.name}' is only "
            f"{_length(parent)} long; give less, or branch from an earlier stage"
        )
    return parent, start_step


def _steps(stage: Stage, start_step: int, start_tokens: int, tokens_per_step: int) -> int:
    """Length of the stage in whole steps, by the rounding rule."""
    field, amount = ("until", stage.until) if stage.until is not None else ("tokens", stage.tokens)
    assert amount is not None, "recipe.checks lets no stage through without a length"
    start = 0 if field == "tokens" else start_step if amount.unit == "steps" else start_tokens
    length = amount.value - start
    steps = length if amount.unit == "steps" else round_half_up(Fraction(length, tokens_per_step))
    here = f"stages.{stage.name}.{field} is {amount}"
    where = f"{format_tokens(start_tokens)} tokens (step {start_step:,})"
    if length < 0:
        raise UserError(f"{here}, but the stage starts at {where}: it would end before it starts")
    if steps == 0:
        raise UserError(
            f"{here}, but the stage starts at {where}: no step of {tokens_per_step:,} tokens fits"
        )
    return steps


def _foreign_order(recipe: Recipe, stage: Stage) -> Stream | None:
    """The order of the older run that the stage continues, if it does."""
    order = stage.megatron_order
    if order is None:
        return None
    from megatron_smol.data.megatron_order import find_blend

    paths = {name: recipe.sources[name].path for name in stage.mixture}
    length = recipe.training_of(stage).seq_length
    try:
        return find_blend(Path(order.cache), order.blend, order.start_sample, length, stage.mixture, paths)
    except UserError as error:
        raise type(error)(f"stages.{stage.name}.megatron_order: {error}") from None


def _draws(weights: Mapping[str, Fraction], foreign: Stream | None, samples: int) -> dict[str, int]:
    if foreign is None:
        counts = Blend(weights).counts(samples)
    else:
        counts = {name: sum(by_epoch.values()) for name, by_epoch in foreign.use(samples).items()}
    return {name: counts.get(name, 0) for name in weights}


def _cursors_at(stage: StagePlan, step: int, orders: Mapping[str, SourceOrder]) -> dict[str, Cursor]:
    """Where every source stands after lineage step `step` of `stage`."""
    samples = (step - stage.start_step) * stage.global_batch
    if stage.foreign_order is not None:
        # Which windows of our order it has read cannot be told: our order goes on with an epoch of its own.
        used = stage.foreign_order.use(samples)
        return {
            name: order.start_of_epoch(max(used[name]) + 1) if name in used else stage.cursors[name]
            for name, order in orders.items()
        }
    counts = _draws(stage.weights, None, samples)
    return {name: order.advance(stage.cursors[name], counts.get(name, 0)) for name, order in orders.items()}


def _tokens_at(stage: StagePlan, step: int, orders: Mapping[str, SourceOrder]) -> dict[str, int]:
    """Tokens read from every source along the lineage up to lineage step `step` of `stage`."""
    counts = _draws(stage.weights, stage.foreign_order, (step - stage.start_step) * stage.global_batch)
    return {name: stage.tokens_before[name] + counts.get(name, 0) * stage.seq_length for name in orders}


def _schedules(recipe: Recipe, stages: list[StagePlan]) -> tuple[Schedule, ...]:
    """The rate of each stage: the recipe's schedule, or its own from where its parent stands."""
    base = _recipe_schedule(recipe.lr, [stage for stage in stages if not stage.is_branch])
    schedules: list[Schedule] = []
    for stage, own in zip(stages, (stage.lr for stage in recipe.stages), strict=True):
        if own is None:
            schedules.append(base)
            continue
        parent = next((other for other in stages if other.name == stage.parent), None)
        inherited = schedules[parent.index](stage.start_tokens) if parent else base(0)
        start = inherited if own.start is None else own.start
        schedules.append(StageDecay(start, own.end, stage.start_tokens, stage.end_tokens, own.shape))
    return tuple(schedules)


def _recipe_schedule(lr: LearningRate, trunk: list[StagePlan]) -> WarmupStableDecay:
    warmup = trunk_tokens(lr.warmup, trunk)
    start = None if lr.decay_start is None else trunk_tokens(lr.decay_start, trunk)
    end = trunk[-1].end_tokens if lr.decay_end is None else trunk_tokens(lr.decay_end, trunk)
    if start is not None and start < warmup:
        raise UserError(
            f"lr.decay_start is {lr.decay_start} ({format_tokens(start)} tokens), before the warm-up ends "
            f"at {lr.warmup} ({format_tokens(warmup)} tokens); move it behind the warm-up"
        )
    if start is not None and end <= start:
        what = "the end of the trunk" if lr.decay_end is None else f"lr.decay_end, {lr.decay_end}"
        raise UserError(
            f"lr.decay_start is {lr.decay_start} ({format_tokens(start)} tokens), not before {what} "
            f"({format_tokens(end)} tokens); give an earlier decay_start or a later decay_end"
        )
    return WarmupStableDecay(lr.peak, warmup, start, end, lr.shape, lr.final)


def trunk_tokens(amount: Amount, trunk: list[StagePlan] | tuple[StagePlan, ...]) -> int:
    """An amount as tokens along the trunk; steps beyond its end count as its last stage's."""
    if amount.unit == "tokens":
        return amount.value
    stage = next((stage for stage in trunk if amount.value <= stage.end_step), trunk[-1])
    return stage.tokens_at(amount.value)


def _held_out_problems(plan: Plan) -> list[Problem]:
    held_out = plan.recipe.data.holdout_tokens
    return [
        Problem(
            "warning",
            f"stage '{stage.name}' reads in the order of an older run, which does not know data.holdout_tokens: "
            f"it may train on the last {held_out:,} tokens of each source, which validation uses",
        )
        for stage in plan.stages
        if stage.foreign_order is not None and held_out
    ]


def _length(stage: StagePlan) -> str:
    return f"{format_tokens(stage.tokens)} tokens ({stage.steps:,} steps)"
