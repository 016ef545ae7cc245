"""FLOPs of a token, in the two conventions that are in use.

Read by `estimate` and `speed`, by the trainer's monitor and by `smol bench train`.
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
