"""What a plan costs: memory per GPU, FLOPs, time and GPU-hours, bytes on disk. Formulas, no measurements.

Used by `render` and `document` for `smol plan`. The formulas and their sources are in `memory`, `flops`, `traffic` and `speed`;
here they meet the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smol.recipe.devices import DEFAULT, DEVICES, Device
from megatron_smol.recipe.flops import flops_per_token
from megatron_smol.recipe.memory import Kernels, Layout, Memory, embedding_parameters, memory
from megatron_smol.recipe.plan import Plan, StagePlan
from megatron_smol.recipe.schema import Model, Parallel
from megatron_smol.recipe.speed import Calibration, StepTime, step_time
from megatron_smol.recipe.traffic import Traffic, traffic

__all__ = ["Memory", "Traffic", "embedding_parameters", "flops_per_token", "stage_traffic"]


@dataclass(frozen=True)
class Compute:
    """FLOPs and time of the whole plan, branches included."""

    flops: float  # causal attention counted half, as Megatron does
    flops_full: float  # attention counted in full, as PaLM does
    gpu_hours: float
    tokens_per_second_per_gpu: float  # average over the plan
    assumed: bool  # the speed was not given, but comes from the model of `speed`
    device: str


@dataclass(frozen=True)
class Disk:
    """Checkpoints of the whole plan."""

    written: int  # saves over the run
    kept: int  # stage ends, branch points and those of save.keep_every, kept for good
    bytes_each: int
    bytes_at_once: int  # kept, the last intervals, and the one being written


def data_parallel(parallel: Parallel) -> int:
    """World size / (tp * pp * cp), one where the recipe gives no `gpus`."""
    return Layout.of(parallel).dp


def kernels(parallel: Parallel) -> Kernels:
    """A recipe that names GPUs is counted as on GPUs with Transformer Engine, any other as on the CPU."""
    return "cpu" if parallel.gpus is None else "te"


def memory_per_gpu(model: Model, parallel: Parallel, stage: StagePlan) -> Memory:
    """Peak bytes on the fullest pipeline rank."""
    return memory(model, Layout.of(parallel), stage, kernels(parallel))


def stage_traffic(model: Model, parallel: Parallel, stage: StagePlan) -> Traffic:
    """Bytes that a rank sends in one step of the stage."""
    return traffic(model, Layout.of(parallel), stage)


def stage_time(
    model: Model,
    parallel: Parallel,
    stage: StagePlan,
    device: Device = DEVICES[DEFAULT],
    calibration: Calibration | None = None,
) -> StepTime:
    """Modelled seconds of one step of the stage."""
    return step_time(model, Layout.of(parallel), stage, device, calibration)


def compute(
    plan: Plan,
    tokens_per_second_per_gpu: float | None = None,
    device: Device = DEVICES[DEFAULT],
    calibration: Calibration | None = None,
) -> Compute:
    """GPU-hours of all stages at a given speed, or at the modelled speed of each stage where none is given."""
    model, parallel = plan.recipe.model, plan.recipe.parallel
    both = [
        sum(flops_per_token(model, stage.seq_length, causal) * stage.tokens for stage in plan.stages)
        for causal in (True, False)
    ]
    tokens = sum(stage.tokens for stage in plan.stages)
    if tokens_per_second_per_gpu is not None:
        seconds = tokens / tokens_per_second_per_gpu
    else:
        seconds = sum(
            stage.tokens / stage_time(model, parallel, stage, device, calibration).tokens_per_second_per_gpu
            for stage in plan.stages
        )
    assumed = tokens_per_second_per_gpu is None
    return Compute(both[0], both[1], seconds / 3600, tokens / seconds, assumed, device.name)


def checkpoint_bytes(model: Model, precision: str) -> int:
    """Bytes a weight: itself (bf16 2, fp32 4), the optimizer's fp32 copy 4 and two moments 8. Gradients are not saved."""
    return model.parameters() * (16 if precision == "fp32" else 14)


def saves_in(plan: Plan, stage: StagePlan) -> int:
    """Checkpoints written during `stage`: multiples of the interval, branch points, and its end."""
    every = plan.recipe.save.every
    multiples = stage.end_step // every - stage.start_step // every
    extra = {step for name, step in plan.save_points() if name == stage.name} | {stage.end_step}
    return multiples + sum(step % every != 0 for step in extra)


def disk(plan: Plan) -> Disk:
    """Checkpoints over the run and the most that lie on disk at once."""
    points = plan.kept()
    each = max(checkpoint_bytes(plan.recipe.model, stage.precision) for stage in plan.stages)
    at_once = len(points) + plan.recipe.save.keep_last + 1
    written = sum(saves_in(plan, stage) for stage in plan.stages)
    return Disk(written, len(points), each, min(at_once, written) * each)
