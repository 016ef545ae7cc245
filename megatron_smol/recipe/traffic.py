"""Bytes that a rank sends in one optimizer step, by purpose. Ring algorithms: (n - 1) / n of the data, twice for an all-reduce.

Read by `speed` (how long that takes) and `estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smol.recipe.memory import Layout, Work, rank_parameters
from megatron_smol.recipe.schema import Model


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends per optimizer step."""

    tensor: float
    pipeline: float
    context: float
    gradients: float
    parameters: float  # the updated weights, gathered from their shards

    @property
    def total(self) -> float:
        return self.tensor + self.pipeline + self.context + self.gradients + self.parameters


def traffic(model: Model, layout: Layout, work: Work) -> Traffic:
    """Of the rank that sends most."""
    micro_batches = layout.micro_batches(work)
    gradients, parameters = _data_parallel(model, layout, work)
    return Traffic(
        tensor=micro_batches * _tensor(model, layout, work),
        pipeline=micro_batches * _pipeline(model, layout, work),
        context=micro_batches * _context(model, layout, work),
        gradients=gradients,
        parameters=parameters,
    )


def _activation(model: Model, layout: Layout, work: Work) -> float:
    """Bytes of a micro-batch's residual stream, whole."""
    return layout.tokens(work) * model.hidden_size * _width(work)


def _tensor(model: Model, layout: Layout, work: Work) -> float:
    """Per micro-batch: a layer's two all-reduces forward and two backward; with sequence parallel each is a
    reduce-scatter and an all-gather of the same volume, and the backward pass gathers two inputs once more
    (Korthikanti et al. 2022, section 4.2). Then the embedding, and the gradient of the output layer's input."""
    share = (layout.tp - 1) / layout.tp
    per_layer = 10 if layout.sequence_parallel else 8
    per_layer += 4 if layout.recompute == "full" else 0
    layers = model.layers / layout.pp
    return share * _activation(model, layout, work) * (per_layer * layers + 2)


def _pipeline(model: Model, layout: Layout, work: Work) -> float:
    """Per micro-batch: the residual stream on to the next rank and its gradient back, for every part of the model."""
    if layout.pp == 1:
        return 0.0
    return 2 * layout.vpp * _activation(model, layout, work) / layout.residual_split


def _context(model: Model, layout: Layout, work: Work) -> float:
    """Per micro-batch and layer: keys and values to all others forward; backward again, and their gradients."""
    kv = model.kv_heads * model.head_dim
    keys_and_values = layout.tokens(work) * 2 * kv * _width(work) / layout.tp
    passes = 3 + (1 if layout.recompute == "full" else 0)
    return passes * (layout.cp - 1) * keys_and_values * model.layers / layout.pp


def _data_parallel(model: Model, layout: Layout, work: Work) -> tuple[float, float]:
    """Once a step: fp32 gradients reduced to their shards and weights gathered (Rajbhandari et al. 2020, arXiv 1910.02054);
    without the distributed optimizer all gradients to all. Tied tables of the first and last rank are added up."""
    ranks = layout.dp * layout.cp
    parameters = max(rank_parameters(model, layout, position) for position in (0, layout.pp - 1))
    share = (ranks - 1) / ranks
    both = 1 if layout.distributed_optimizer else 2
    gradients = both * share * 4.0 * parameters
    if model.tied_embeddings and layout.pp > 1:
        gradients += 4.0 * model.vocab_size * model.hidden_size / layout.tp
    gathered = share * _width(work) * parameters if layout.distributed_optimizer else 0.0
    return gradients, gathered


def _width(work: Work) -> int:
    return 4 if work.precision == "fp32" else 2
