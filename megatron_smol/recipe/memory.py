"""Bytes that one rank needs, from formulas: weights, gradients, optimizer, activations, logits, workspace.

Read by `estimate` (what a plan costs), `fit` (what fits) and `speed`. The formulas count tensors, so they hold for
any device; `bench/memory.py` and tests/recipe/test_estimate.py compare them with what real CPU steps allocate. What is
saved for the backward pass depends on the kernels:

cpu    megatron-core's local layers with ours (model/layers.py, model/attention.py). RMSNorm keeps its input and one number a
       row in fp32; in bf16 it is PyTorch's, which keeps its input and the normalised values, both in fp32.
torch  the same layers on a GPU, where RMSNorm is one kernel that keeps its input and one number a row.
te     Transformer Engine 2.11: fused norm + linear, rotary positions, SwiGLU and cross-entropy. Read in its source,
       not measured yet (bench/gpu/PENDING.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_smol.recipe.schema import Model, Parallel

Kernels = Literal["cpu", "torch", "te"]
Recompute = Literal["none", "selective", "full"]


class Work(Protocol):
    """What a rank is given: a StagePlan, or anything with these."""

    @property
    def seq_length(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def precision(self) -> str: ...


@dataclass(frozen=True)
class Batches:
    """The smallest `Work`."""

    seq_length: int
    micro_batch: int
    global_batch: int
    precision: str


@dataclass(frozen=True)
class Layout:
    """How ranks share the model, its windows and its optimizer."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    cp_comm: Literal["ring", "all_gather"] = "ring"
    distributed_optimizer: bool = True

    @classmethod
    def of(cls, parallel: Parallel, gpus: int | None = None) -> Layout:
        """A recipe's layout over `gpus` ranks (default: the recipe's own number, or as few as it needs)."""
        ranks = gpus or parallel.gpus or parallel.model_ranks
        return cls(
            tp=parallel.tp,
            pp=parallel.pp,
            cp=parallel.cp,
            vpp=parallel.vpp,
            dp=max(ranks // parallel.model_ranks, 1),
            sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
            recompute=parallel.recompute,
            cp_comm=parallel.cp_comm,
            distributed_optimizer=parallel.distributed_optimizer,
        )

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def residual_split(self) -> int:
        """Ranks over which norms and residuals of a window's part are split."""
        return self.tp if self.sequence_parallel else 1

    def micro_batches(self, work: Work) -> int:
        """Micro-batches that one rank passes through its layers in a step."""
        return max(work.global_batch // (work.micro_batch * self.dp), 1)

    def tokens(self, work: Work) -> float:
        """Tokens of a micro-batch on one rank."""
        return work.micro_batch * work.seq_length / self.cp

    def __str__(self) -> str:
        parts = [f"tp {self.tp}", f"pp {self.pp}", f"dp {self.dp}"]
        parts[2:2] = [f"cp {self.cp}"] if self.cp > 1 else []
        parts[2:2] = [f"vpp {self.vpp}"] if self.vpp > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank.

    activations: saved by the layers for the backward pass; logits: of the loss, on the last pipeline rank;
    workspace: the largest other tensors of the moment, such as a weight's gradient on its way to the buffer.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float

    @property
    def states(self) -> float:
        """What lies there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.activations + self.logits + self.workspace


# --- parameters --------------------------------------------------------------------------------------------


def linear_weights_per_layer(model: Model) -> int:
    """q and output h*h each, k and v h*kv each, SwiGLU's three h*f."""
    h, kv = model.hidden_size, model.kv_heads * model.head_dim
    return 2 * h * h + 2 * h * kv + 3 * h * model.ffn_size


def embedding_parameters(model: Model) -> int:
    """vocab * hidden, twice when the output layer is not tied."""
    return model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)


def rank_parameters(model: Model, layout: Layout, position: int) -> int:
    """Parameters on pipeline rank `position`, exact: linears and tables over tp, norms whole.

    The first rank holds the embedding, the last the output layer and the last norm; a tied table is held by both.
    """
    first, last = position == 0, position == layout.pp - 1
    layers = model.layers // layout.pp
    tables = 1 if model.tied_embeddings and layout.pp == 1 else first + last
    linears = layers * linear_weights_per_layer(model) + tables * model.vocab_size * model.hidden_size
    return linears // layout.tp + (2 * layers + last) * model.hidden_size


# --- memory ------------------------------------------------------------------------------------------------


def memory(model: Model, layout: Layout, work: Work, kernels: Kernels = "te") -> Memory:
    """Of the fullest pipeline rank."""
    ranks = (rank_memory(model, layout, work, position, kernels) for position in {0, layout.pp - 1})
    return max(ranks, key=lambda one: one.total)


def rank_memory(model: Model, layout: Layout, work: Work, position: int, kernels: Kernels) -> Memory:
    """Peak bytes of pipeline rank `position`.

    States, per weight: bf16 and FP8 2 (weight) + 4 (fp32 gradient) + 12 (fp32 copy and two moments) = 18 bytes; fp32
    4 + 4 + 8 = 16; FP8 2 more per linear weight (its cast and the transpose of that). The distributed optimizer divides
    the optimizer's part by dp * cp.
    """
    weights, width = rank_parameters(model, layout, position), _width(work)
    shards = layout.dp * layout.cp if layout.distributed_optimizer else 1
    linears = model.layers // layout.pp * linear_weights_per_layer(model) / layout.tp
    kept = _saved_bytes(model, layout, work, position, kernels)
    logits = _logits_bytes(model, layout, work, kernels) if position == layout.pp - 1 else 0.0
    workspace = _workspace_bytes(model, layout, work, kernels, logits)
    if kernels == "cpu" and shards > 1:
        workspace = max(workspace, 4.0 * weights - kept - logits)  # gloo reduces a copy of the gradients
    return Memory(
        weights=width * weights + (2 * linears if _is_fp8(work) else 0),
        gradients=4.0 * weights,
        optimizer=(8 if width == 4 else 12) * weights / shards,
        activations=kept,
        logits=logits,
        workspace=workspace,
    )


def layer_bytes_per_token(model: Model, layout: Layout, work: Work, kernels: Kernels) -> float:
    """What one layer saves for its backward pass, per token of the rank, without recomputation.

    The terms are Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for RMSNorm, SwiGLU, grouped queries and attention
    without stored scores. Two norms (`_norm_bytes`); over tp: the joined queries, keys and values (h + 2kv; the values
    are a view of them), the rotated queries and keys (h + kv), attention's output (h) and one fp32 number a head, gate
    and up (2f) and their product (f). FP8 keeps the inputs of the linears in one byte instead of two.
    """
    h, kv, f, width = model.hidden_size, model.kv_heads * model.head_dim, model.ffn_size, _width(work)
    attention: float = width * (3 * h + 3 * kv)
    if layout.cp > 1 and kernels != "te" and layout.cp_comm == "ring":
        attention = width * 4 * h  # keys and values are repeated to all heads
    elif layout.cp > 1 and kernels != "te":
        # Keys and values of the whole window, the output in two orders, and (2cp + 1) squares of s / 2cp as mask.
        mask = work.seq_length * (2 * layout.cp + 1) / (4 * layout.cp * work.micro_batch) * layout.tp
        attention = width * (3 * h + 2 * kv * layout.cp + mask)
    attention += 4 * model.heads
    feed_forward = width * 2 * f + (1 if _is_fp8(work) else width) * f
    attention += h if _is_fp8(work) else 0  # the output once more, cast for its linear
    return 2 * _norm_bytes(model, layout, work, kernels) + (attention + feed_forward) / layout.tp


def _norm_bytes(model: Model, layout: Layout, work: Work, kernels: Kernels) -> float:
    """RMSNorm and the linear behind it, per token: input, output, one fp32 number a row."""
    h, width = model.hidden_size, _width(work)
    output = 1 if _is_fp8(work) else width
    inside = 4 + 4 if kernels == "cpu" and width == 2 else width  # bf16: PyTorch's
    return (h * (inside + output) + 4) / layout.residual_split


def _saved_bytes(model: Model, layout: Layout, work: Work, position: int, kernels: Kernels) -> float:
    """Over all layers and micro-batches that wait for their backward pass on pipeline rank `position`.

    One forward, one backward (Narayanan et al. 2021, arXiv 2104.04473): rank p holds pp - p micro-batches of its layers; with
    v parts a rank, 2(pp - p - 1) + (v - 1)pp + 1 micro-batches of one part. Full recomputation keeps a layer's
    input only; selective leaves out attention's fp32 numbers, the scores being stored nowhere.
    """
    tokens, micro_batches = layout.tokens(work), layout.micro_batches(work)
    behind = layout.pp - position - 1
    if layout.vpp == 1:
        parts = min(behind + 1, micro_batches)
    else:
        parts = min(2 * behind + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)
    layers = model.layers // (layout.pp * layout.vpp) * parts
    each = layer_bytes_per_token(model, layout, work, kernels)
    if layout.recompute == "full":
        each = _width(work) * model.hidden_size / layout.residual_split
    elif layout.recompute == "selective":
        each -= 4 * model.heads / layout.tp
    last_norm = _norm_bytes(model, layout, work, kernels) if behind == 0 else 0
    return tokens * (each * layers + last_norm)


def _logits_bytes(model: Model, layout: Layout, work: Work, kernels: Kernels) -> float:
    """At the loss: bf16 logits and their fp32 softmax together, or fp32 logits turned into it in place.

    Transformer Engine's cross-entropy writes the gradient over the logits.
    """
    width = _width(work)
    each = width if kernels == "te" or width == 4 else width + 4
    return layout.tokens(work) * model.vocab_size / layout.tp * each


def _workspace_bytes(model: Model, layout: Layout, work: Work, kernels: Kernels, logits: float) -> float:
    """Tensors of the moment: the larger of the backward pass of the output layer and that of a transformer layer.

    Output layer: the table's gradient, and the gradient of its input. Transformer layer: the gradient of gate, up and
    their product, and of one weight; with recomputation also what the layer saves, its output once more
    and the gradient of that. The logits are gone by then.
    """
    tokens, width, h, f = layout.tokens(work), _width(work), model.hidden_size, model.ffn_size
    # With sequence parallel, the input of a linear is gathered once more, and the gradient of it is whole at first.
    inputs = width * tokens * h * (2 if layout.sequence_parallel else 1)
    layer = width * (tokens * 3 * f + 2 * f * h) / layout.tp + inputs
    if layout.recompute == "full":
        layer += tokens * (layer_bytes_per_token(model, layout, work, kernels) + 2 * width * h)
    if not logits:
        return layer
    table = width * model.vocab_size * h / layout.tp + inputs
    return max(table, layer - logits)


def _width(work: Work) -> int:
    """Bytes of a weight and of an activation."""
    return 4 if work.precision == "fp32" else 2


def _is_fp8(work: Work) -> bool:
    return work.precision.startswith("fp8")
