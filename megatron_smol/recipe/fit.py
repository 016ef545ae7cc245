"""Which layouts and micro-batches of a recipe fit a given cluster, fastest first, and why others do not.

`smol plan RECIPE --fit 64xH100-80GB`. Every layout that the recipe could ask for is tried: tp inside a node, pp, virtual pp, cp,
recomputation; each stage gets the micro-batch that `speed` finds fastest among those that `memory` lets in.
`fit_view` prints what is found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from megatron_smol.errors import UserError
from megatron_smol.recipe.checks import divisors, window_pieces
from megatron_smol.recipe.devices import Cluster
from megatron_smol.recipe.memory import Batches, Layout, Memory, Recompute, memory
from megatron_smol.recipe.plan import Plan, StagePlan
from megatron_smol.recipe.schema import Model
from megatron_smol.recipe.speed import Calibration, StepTime, step_time
from megatron_smol.recipe.units import format_bytes

# Of a GPU's memory the plan leaves free: CUDA, NCCL and cuBLAS take about 2 GB, an allocator's gaps some per cent more.
RESERVED_BYTES = 2e9
MARGIN = 0.10
LARGEST_MICRO_BATCH = 64
_VIRTUAL = (1, 2, 3, 4, 6)
# What one would think of next: a field of the layout, and a value.
_ALTERNATIVES: tuple[tuple[str, object], ...] = (
    ("tp", 1),
    ("tp", 2),
    ("tp", 8),
    ("pp", 2),
    ("cp", 2),
    ("recompute", "none"),
    ("recompute", "full"),
)
_RECOMPUTE: tuple[Recompute, ...] = ("none", "full")  # selective saves next to nothing: no scores are stored


@dataclass(frozen=True)
class StageFit:
    """One stage under a layout, at its best micro-batch."""

    stage: StagePlan
    work: Batches
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class Proposal:
    """A layout that fits in every stage."""

    layout: Layout
    stages: tuple[StageFit, ...]
    cluster: Cluster

    @property
    def seconds(self) -> float:
        return sum(one.time.total * one.stage.steps for one in self.stages)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return sum(one.stage.tokens for one in self.stages) / self.seconds / self.layout.ranks

    @property
    def fullest(self) -> StageFit:
        return max(self.stages, key=lambda one: one.memory.total)

    @property
    def bytes_left(self) -> float:
        """Of the fullest stage, up to the GPU's whole memory."""
        return self.cluster.device.memory - self.fullest.memory.total

    def lost(self) -> dict[str, float]:
        """Share of the whole time by part, all but computing."""
        total: dict[str, float] = {}
        for one in self.stages:
            for name, seconds in one.time.parts().items():
                total[name] = total.get(name, 0.0) + seconds * one.stage.steps / self.seconds
        total.pop("compute")
        return total

    def reason(self) -> str:
        """What limits it, in one sentence."""
        name, share = max(self.lost().items(), key=lambda item: item[1])
        limit = f"{name} takes {share:.0%}" if share >= 0.005 else "nothing but computing takes time"
        full = self.fullest
        return (
            f"{limit}; {format_bytes(full.memory.total)} of {format_bytes(self.cluster.device.memory)} "
            f"in {full.stage.name}"
        )

    def overrides(self) -> list[str]:
        """The settings that make the recipe so, as `smol` takes them."""
        layout = self.layout
        settings = {
            "parallel.gpus": layout.ranks,
            "parallel.tp": layout.tp,
            "parallel.pp": layout.pp,
            "parallel.cp": layout.cp,
            "parallel.vpp": layout.vpp,
            "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
            "parallel.recompute": layout.recompute,
        }
        texts = [f"{name}={value}" for name, value in settings.items()]
        return texts + [f"stages.{one.stage.name}.micro_batch={one.work.micro_batch}" for one in self.stages]


@dataclass(frozen=True)
class Rejection:
    """A layout that does not do, or does worse, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Fit:
    """proposals: best first; rejections: the alternatives that one would think of."""

    cluster: Cluster
    calibration: Calibration
    proposals: tuple[Proposal, ...]
    rejections: tuple[Rejection, ...]


def budget(cluster: Cluster) -> float:
    """Bytes a plan may use on each GPU."""
    return cluster.device.memory * (1 - MARGIN) - RESERVED_BYTES


def fit(plan: Plan, cluster: Cluster, calibration: Calibration | None = None) -> Fit:
    """Raises UserError when no layout fits, with what comes closest."""
    calibration = calibration or Calibration()
    for stage in plan.stages:
        cluster.device.peak_flops(stage.precision)  # refuses FP8 where there is none
    tried = [_try(plan, layout, cluster, calibration) for layout in layouts(plan, cluster)]
    proposals = [one for one in tried if isinstance(one, Proposal)]
    if not proposals:
        raise UserError(_nothing_fits(plan, cluster, [one for one in tried if isinstance(one, Rejection)]))
    proposals.sort(key=lambda one: one.seconds)
    rejections = _rejections(plan, cluster, calibration, proposals)
    return Fit(cluster, calibration, tuple(proposals), tuple(rejections))


# --- what may be tried -------------------------------------------------------------------------------------


def tensor_parallel_choices(model: Model, gpus_per_node: int) -> list[int]:
    """tp divides heads, key/value heads, feed-forward and vocabulary, and stays inside a node."""
    common = gcd(model.heads, model.kv_heads, model.ffn_size, model.vocab_size)
    return [tp for tp in divisors(common) if tp <= gpus_per_node]


def layouts(plan: Plan, cluster: Cluster) -> Iterator[Layout]:
    """All that the model and the number of GPUs allow; batches and memory are looked at later."""
    model = plan.recipe.model
    for tp in tensor_parallel_choices(model, cluster.device.gpus_per_node):
        for pp in divisors(model.layers):
            for cp in _context_choices(plan):
                if cluster.gpus % (tp * pp * cp):
                    continue
                for vpp in _VIRTUAL if pp > 1 else (1,):
                    if model.layers % (pp * vpp):
                        continue
                    for recompute in _RECOMPUTE:
                        yield _layout(plan, cluster, tp, pp, cp, vpp, recompute)


def _layout(
    plan: Plan, cluster: Cluster, tp: int, pp: int, cp: int, vpp: int, recompute: Recompute
) -> Layout:
    parallel = plan.recipe.parallel
    sequence_parallel = tp > 1 and _divides_windows(plan, window_pieces(cp, tp))
    return Layout(
        tp=tp,
        pp=pp,
        cp=cp,
        vpp=vpp,
        dp=cluster.gpus // (tp * pp * cp),
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        cp_comm=parallel.cp_comm,
        distributed_optimizer=parallel.distributed_optimizer,
    )


def _context_choices(plan: Plan) -> list[int]:
    return [cp for cp in (1, 2, 4, 8) if _divides_windows(plan, window_pieces(cp, tp=1))]


def _divides_windows(plan: Plan, pieces: int) -> bool:
    return all(stage.seq_length % pieces == 0 for stage in plan.stages)


# --- one layout --------------------------------------------------------------------------------------------


def _try(plan: Plan, layout: Layout, cluster: Cluster, calibration: Calibration) -> Proposal | Rejection:
    """The layout with the best micro-batch in each stage, or why it does not do."""
    fits: list[StageFit] = []
    for stage in plan.stages:
        if stage.global_batch % layout.dp:
            return Rejection(
                str(layout),
                f"{layout.dp} data-parallel ranks do not divide the global batch of {stage.global_batch} "
                f"windows in {stage.name}; allowed: {_listed(_divisors_near(stage.global_batch, layout.dp))}",
            )
        choices = [
            _stage_fit(plan, layout, cluster, calibration, stage, micro_batch)
            for micro_batch in _micro_batches(stage, layout)
        ]
        if not choices:
            return Rejection(
                str(layout),
                f"a virtual pipeline needs micro-batches in multiples of pp ({layout.pp}), and {stage.name} has "
                f"{stage.global_batch // layout.dp} windows a rank",
            )
        possible = [one for one in choices if one.memory.total <= budget(cluster)]
        if not possible:
            least = min(choices, key=lambda one: one.memory.total)
            return Rejection(
                str(layout),
                f"{stage.name} needs {format_bytes(least.memory.total)} at micro-batch {least.work.micro_batch} "
                f"({_largest_part(least.memory)}), more than {format_bytes(budget(cluster))}",
            )
        fits.append(min(possible, key=lambda one: one.time.total))
    return Proposal(layout, tuple(fits), cluster)


def _micro_batches(stage: StagePlan, layout: Layout) -> list[int]:
    """Divisors of a rank's share of the global batch; a virtual pipeline takes them in rounds of pp."""
    share = stage.global_batch // layout.dp
    return [
        size
        for size in divisors(share)
        if size <= LARGEST_MICRO_BATCH and (layout.vpp == 1 or share // size % layout.pp == 0)
    ]


def _stage_fit(
    plan: Plan,
    layout: Layout,
    cluster: Cluster,
    calibration: Calibration,
    stage: StagePlan,
    micro_batch: int,
) -> StageFit:
    model = plan.recipe.model
    work = Batches(stage.seq_length, micro_batch, stage.global_batch, stage.precision)
    time = step_time(model, layout, work, cluster.device, calibration)
    return StageFit(stage, work, memory(model, layout, work, "te"), time)


def _largest_part(memory: Memory) -> str:
    parts = {
        "weights, gradients and optimizer": memory.states,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{format_bytes(parts[name])} of it {name}"


# --- why not -----------------------------------------------------------------------------------------------


def _rejections(
    plan: Plan, cluster: Cluster, calibration: Calibration, proposals: Sequence[Proposal]
) -> Iterator[Rejection]:
    """The alternatives one would think of, next to the best proposal."""
    best, model = proposals[0], plan.recipe.model
    allowed = tensor_parallel_choices(model, cluster.device.gpus_per_node)
    refused = [tp for tp in (2, 4, 8) if tp not in allowed]
    if refused:
        yield Rejection(
            f"tp {_listed(refused)}",
            f"tp must divide heads ({model.heads}), key/value heads ({model.kv_heads}), the feed-forward "
            f"({model.ffn_size}) and the vocabulary ({model.vocab_size}); allowed in a node: {_listed(allowed)}",
        )
    bad_pp = [pp for pp in (2, 4, 8) if model.layers % pp]
    if bad_pp:
        yield Rejection(
            f"pp {_listed(bad_pp)}",
            f"pp must divide the {model.layers} layers; allowed: {_listed(divisors(model.layers))}",
        )
    yield from _larger_micro_batches(plan, cluster, calibration, best)
    for name, value in _ALTERNATIVES:
        if getattr(best.layout, name) == value:
            continue
        fitting = next((one for one in proposals if getattr(one.layout, name) == value), None)
        if fitting is not None:
            why = f"fits, but is {_slower(fitting, best)}: {fitting.reason()}"
            yield Rejection(str(fitting.layout), why)
            continue
        possible = (layout for layout in layouts(plan, cluster) if getattr(layout, name) == value)
        first = next(possible, None)
        failed = first and _try(plan, first, cluster, calibration)
        if isinstance(failed, Rejection):
            yield failed


def _larger_micro_batches(
    plan: Plan, cluster: Cluster, calibration: Calibration, best: Proposal
) -> Iterator[Rejection]:
    """The next larger micro-batch of the stage that fills a GPU most: too large, or no faster."""
    chosen = best.fullest
    larger = [size for size in _micro_batches(chosen.stage, best.layout) if size > chosen.work.micro_batch]
    if not larger:
        return
    found = _stage_fit(plan, best.layout, cluster, calibration, chosen.stage, larger[0])
    what = f"micro-batch {larger[0]} in {chosen.stage.name}"
    if found.memory.total > budget(cluster):
        why = (
            f"needs {format_bytes(found.memory.total)} ({_largest_part(found.memory)}), more than "
            f"{format_bytes(budget(cluster))}"
        )
    else:
        change = found.time.total / chosen.time.total - 1
        why = f"fits, but a step takes {change:.1%} longer than with {chosen.work.micro_batch}"
    yield Rejection(what, why)


def _slower(other: Proposal, best: Proposal) -> str:
    share = other.seconds / best.seconds - 1
    return f"{share:.1%} slower" if share >= 0.0005 else "no faster"


def _nothing_fits(plan: Plan, cluster: Cluster, failures: Sequence[Rejection]) -> str:
    reasons = [one.why for one in failures]
    too_large = [why for why in reasons if "more than" in why]
    closest = (too_large or reasons or [f"{cluster.gpus} GPUs are no multiple of any layout's ranks"])[-1]
    return (
        f"no layout of {plan.recipe.name} fits {cluster} ({format_bytes(budget(cluster))} usable a GPU); "
        f"the last of {len(reasons)} tried: {closest}. Take another number of GPUs, larger ones, or a global_batch that divides"
    )


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The divisors of `number` on either side of `wanted`."""
    all_of = divisors(number)
    below = [one for one in all_of if one < wanted][-2:]
    return below + [one for one in all_of if one > wanted][:2]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
