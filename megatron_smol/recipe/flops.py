"""FLOPs of a token, in the two conventions that are in use, and as a counter sees them.

Read by `estimate` and `speed`, by the trainer's monitor and by `smol bench train`. tests/recipe/test_estimate.py compares
them with torch's counter over a real step.
"""

from __future__ import annotations

from megatron_smol.recipe.memory import linear_weights_per_layer
from megatron_smol.recipe.schema import Model


def flops_per_token(model: Model, seq_length: int, causal: bool = True) -> float:
    """Forward and backward: 6 per weight of linears and output layer, plus attention 12*L*h*s.

    `causal` halves attention, which is what is computed and how Megatron counts it; the full count is PaLM's
    (Chowdhery et al. 2022, appendix B) and llm-foundry's.
    """
    attention = 12 * model.layers * model.hidden_size * seq_length
    return 6 * gemm_weights(model) + (attention / 2 if causal else attention)


def gemm_weights(model: Model) -> int:
    """Weights that multiply every token: linears and the output layer, tied or not."""
    return model.layers * linear_weights_per_layer(model) + model.vocab_size * model.hidden_size


def forward_flops_per_token(model: Model, seq_length: int, causal: bool = True) -> float:
    """A third of the whole: 2 per weight, 4*L*h*s for attention."""
    return flops_per_token(model, seq_length, causal) / 3


def executed_flops_per_token(model: Model, seq_length: int, recompute: str = "none") -> float:
    """What runs, attention counted in full: a flash kernel's backward pass makes five products for the forward's two
    (Dao et al. 2022, arXiv 2205.14135), and full recomputation repeats the forward pass of the layers."""
    layers = model.layers * linear_weights_per_layer(model)
    attention = 4 * model.layers * model.hidden_size * seq_length
    again = {"none": 0, "selective": attention, "full": 2 * layers + attention}[recompute]
    return 6 * gemm_weights(model) + attention * 3.5 + again
