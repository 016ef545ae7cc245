"""What a plan costs: parameters, FLOPs, memory per GPU, GPU-hours, bytes on disk. Formulas, no measurements.

Used by `render` for `smol plan`. Each formula stands in its docstring with its source; memory is good to
about 15 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smol.recipe.plan import Plan, StagePlan
from megatron_smol.recipe.schema import Model, Parallel

# NVIDIA's data sheet for H100 SXM, dense bf16. Of it, 40 % is what good public runs of 1-2B models reach
# (llm-foundry's 1.3B: 41.8 %; Megatron-LM's 2B: 41 %).
H100_BF16_FLOPS = 989e12
ASSUMED_MFU = 0.40


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest pipeline rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Compute:
    """FLOPs and time of the whole plan, branches included."""

    flops: float
    gpu_hours: float
    tokens_per_second_per_gpu: float  # average over the plan
    assumed: bool  # the speed was not given, but taken from ASSUMED_MFU


@dataclass(frozen=True)
class Disk:
    """Checkpoints of the whole plan."""

    written: int  # saves over the run
    kept: int  # stage ends and branch points, kept for good
    bytes_each: int
    bytes_at_once: int  # kept, the last intervals, and the one being written


def embedding_parameters(model: Model) -> int:
    """vocab * hidden, twice when the output layer is not tied."""
    return model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)


def linear_weights_per_layer(model: Model) -> int:
    """q and output h*h each, k and v h*kv each, SwiGLU's three h*f."""
    h, kv = model.hidden_size, model.kv_heads * model.head_dim
    return 2 * h * h + 2 * h * kv + 3 * h * model.ffn_size


def flops_per_token(model: Model, seq_length: int, causal: bool = True) -> float:
    """Forward and backward: 6 per weight of linears and output layer, plus attention 12*L*h*s.

    `causal` halves attention, which is what is computed and how Megatron counts it; the full count is PaLM's
    (Chowdhery et al. 2022, appendix B) and llm-foundry's.
    """
    weights = model.layers * linear_weights_per_layer(model) + model.vocab_size * model.hidden_size
    attention = 12 * model.layers * model.hidden_size * seq_length
    return 6 * weights + (attention / 2 if causal else attention)


def data_parallel(parallel: Parallel) -> int:
    """World size / (tp * pp), one where the recipe gives no `gpus`."""
    return max((parallel.gpus or 0) // (parallel.tp * parallel.pp), 1)


def memory_per_gpu(model: Model, parallel: Parallel, stage: StagePlan) -> Memory:
    """Peak bytes on the fullest pipeline rank, no recomputation, attention without stored scores.

    Per weight: bf16 and FP8 2 (weight) + 4 (fp32 gradient) + 12 (fp32 copy and two moments) = 18 bytes; fp32
    4 + 4 + 8 = 16; FP8 2 more per linear weight (cast copy and its transpose). The distributed optimizer
    divides the optimizer's part by the data-parallel ranks.
    """
    ranks = (_rank_memory(model, parallel, stage, position) for position in {0, parallel.pp - 1})
    return max(ranks, key=lambda memory: memory.total)


def _rank_memory(model: Model, parallel: Parallel, stage: StagePlan, position: int) -> Memory:
    tp, pp = parallel.tp, parallel.pp
    first, last = position == 0, position == pp - 1
    layers = model.layers // pp
    linears = layers * linear_weights_per_layer(model) / tp
    tables = 1 if model.tied_embeddings and pp == 1 else first + last
    weights = (
        linears + tables * model.vocab_size * model.hidden_size / tp + (2 * layers + last) * model.hidden_size
    )
    fp32 = stage.precision == "fp32"
    extra_fp8 = 2 * linears if stage.precision.startswith("fp8") else 0
    return Memory(
        weights=(4 if fp32 else 2) * weights + extra_fp8,
        gradients=4 * weights,
        optimizer=(8 if fp32 else 12) * weights / data_parallel(parallel),
        activations=_activations(model, parallel, stage, position),
    )


def _activations(model: Model, parallel: Parallel, stage: StagePlan, position: int) -> float:
    """Bytes kept for the backward pass: Korthikanti et al. 2022, for SwiGLU, grouped queries, no scores.

    Per token and layer, in elements: two norm inputs and two norm outputs (4h, over tp only with sequence
    parallel), q, k, v and the attention's output (2h + 2kv, over tp), gate, up and their product (3f, over
    tp). With 1F1B, rank p of a pipeline holds pp - p micro-batches. The last rank adds logits: in bf16 2 + 4
    (fp32 softmax) + 2 (gradient) bytes.
    """
    tp, pp = parallel.tp, parallel.pp
    width = 4 if stage.precision == "fp32" else 2
    tokens = stage.micro_batch * stage.seq_length
    residual = 4 * model.hidden_size / (tp if parallel.sequence_parallel else 1)
    split = (2 * model.hidden_size + 2 * model.kv_heads * model.head_dim + 3 * model.ffn_size) / tp
    in_flight = min(
        pp - position, max(stage.global_batch // (stage.micro_batch * data_parallel(parallel)), 1)
    )
    kept = tokens * width * (residual + split) * (model.layers // pp) * in_flight
    return kept + (tokens * model.vocab_size / tp * (2 * width + 4) if position == pp - 1 else 0)


def compute(plan: Plan, tokens_per_second_per_gpu: float | None = None) -> Compute:
    """GPU-hours of all stages at a given speed, or at ASSUMED_MFU of an H100 where none is given."""
    flops = [flops_per_token(plan.recipe.model, stage.seq_length) * stage.tokens for stage in plan.stages]
    tokens = sum(stage.tokens for stage in plan.stages)
    if tokens_per_second_per_gpu is None:
        seconds = sum(flops) / (ASSUMED_MFU * H100_BF16_FLOPS)
    else:
        seconds = tokens / tokens_per_second_per_gpu
    return Compute(sum(flops), seconds / 3600, tokens / seconds, tokens_per_second_per_gpu is None)


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
    points = plan.save_points() | {(stage.name, stage.end_step) for stage in plan.stages}
    each = max(checkpoint_bytes(plan.recipe.model, stage.precision) for stage in plan.stages)
    at_once = len(points) + plan.recipe.save.keep_last + 1
    written = sum(saves_in(plan, stage) for stage in plan.stages)
    return Disk(written, len(points), each, min(at_once, written) * each)
