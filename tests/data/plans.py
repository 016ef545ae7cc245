"""Small stand-ins for recipe.plan's results, and random runs made of them, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from hypothesis import strategies as st

from megatron_smol.data.blend import Blend
from megatron_smol.data.order import Cursor, SourceOrder


@dataclass
class Stage:
    name: str
    seq_length: int
    weights: dict[str, Fraction]
    cursors: dict[str, Cursor]
    global_batch: int = 1
    parent: str | None = None
    start_step: int = 0
    end_step: int = 0
    skipped_tokens: dict[str, int] = field(default_factory=dict)
    foreign_order: None = None

    @property
    def samples(self) -> int:
        return (self.end_step - self.start_step) * self.global_batch


@dataclass
class Plan:
    orders: dict[str, SourceOrder]
    stages: list[Stage] = field(default_factory=list)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def add(
        self,
        weights: dict[str, Fraction],
        seq_length: int,
        steps: int,
        global_batch: int,
        parent: Stage | None = None,
        branch_step: int | None = None,
    ) -> Stage:
        """Append a stage that starts where `parent` stands after `branch_step` (absent: at its end)."""
        cursors = {name: order.start() for name, order in self.orders.items()}
        start_step = 0
        if parent is not None:
            start_step = parent.end_step if branch_step is None else branch_step
            samples = (start_step - parent.start_step) * parent.global_batch
            drawn = Blend(parent.weights).counts(samples)
            cursors = {n: self.orders[n].advance(c, drawn.get(n, 0)) for n, c in parent.cursors.items()}
        skipped = dict.fromkeys(cursors, 0)
        for name in weights:
            cursors[name], skipped[name] = self.orders[name].enter(cursors[name], seq_length)
        stage = Stage(
            f"stage-{len(self.stages)}",
            seq_length,
            weights,
            cursors,
            global_batch,
            parent.name if parent else None,
            start_step,
            start_step + steps,
            skipped,
        )
        self.stages.append(stage)
        return stage

    def lineage(self, stage: Stage) -> list[tuple[Stage, int]]:
        """(stage, samples read of it) from the root to the end of `stage`."""
        path, samples = [(stage, stage.samples)], 0
        while stage.parent is not None:
            parent = self.stage(stage.parent)
            samples = (stage.start_step - parent.start_step) * parent.global_batch
            path.append((parent, samples))
            stage = parent
        return path[::-1]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """1 to 5 sources from one window upwards, 1 to 8 stages that change length and batch, and branches."""
    page_length = draw(st.sampled_from([1, 4, 12]))
    names = [f"s{i}" for i in range(draw(st.integers(1, 5)))]
    seed = draw(st.integers(0, 3))
    pages = st.one_of(st.integers(1, 8), st.integers(100, 300))
    plan = Plan({n: SourceOrder(n, draw(pages) * page_length + 1, page_length, seed) for n in names})
    lengths = [n for n in range(1, page_length + 1) if page_length % n == 0]
    for number in range(draw(st.integers(1, 8))):
        parent, branch_step = None, None
        if number:
            parent = draw(st.sampled_from(plan.stages)) if draw(st.booleans()) else plan.stages[-1]
            if parent is not plan.stages[-1] or draw(st.booleans()):
                branch_step = draw(st.integers(parent.start_step, parent.end_step))
        parts = draw(st.lists(st.integers(0, 50), min_size=len(names), max_size=len(names)).filter(any))
        weights = {n: Fraction(part, sum(parts)) for n, part in zip(names, parts, strict=True) if part}
        steps, batch = draw(st.integers(0, 12)), draw(st.integers(1, 9))
        plan.add(weights, draw(st.sampled_from(lengths)), steps, batch, parent, branch_step)
    return plan
