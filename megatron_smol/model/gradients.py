"""Weight gradients on the CPU: written by the product that computes them, straight into megatron-core's buffer.

A step's first product overwrites its weight's part of the buffer and the next ones add to it, so the buffer needs no
zeros before and no tensor beside it. Looked-up rows of the embedding add theirs there too: the table's gradient is never
built as a table of its own (twice, where it is tied to the output layer).
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.tensor_parallel import layers
from torch import Tensor


def write_gradients_in_place() -> None:
    """Teach megatron-core, once a process."""
    # It looks for this under the name of NVIDIA Apex's extension.
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=_write_product)
    layers._grad_accum_fusion_available = True
    buffers._ParamAndGradBuffer.reset = _begin_step
    tensor_parallel.VocabParallelEmbedding = Embedding


# A part of the buffer that a product writes is `outdated` from the beginning of a step until its first product.


def _begin_step(buffer: Any) -> None:
    """In place of zeroing the whole buffer. (What pads it is zero since it was made.)"""
    for param in buffer.params:
        if hasattr(param.main_grad, "outdated"):
            param.main_grad.outdated = True
        else:
            param.main_grad.zero_()


def _write_product(inputs: Tensor, grad_outputs: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] becomes, or grows by, grad_outputs [tokens, out] transposed times inputs [tokens, in]."""
    if getattr(main_grad, "outdated", False):
        torch.mm(grad_outputs.t(), inputs, out=main_grad)
    else:
        main_grad.addmm_(grad_outputs.t(), inputs)
    main_grad.outdated = False  # type: ignore[attr-defined]


def finish_products(parameters: Any) -> None:
    """A weight that no product reached in this step has no gradient."""
    for param in parameters:
        if getattr(param.main_grad, "outdated", False):
            param.main_grad.zero_()


class Embedding(tensor_parallel.VocabParallelEmbedding):  # type: ignore[misc]
    """megatron-core's embedding; where one rank holds the table in fp32, its gradient goes straight into the buffer."""

    def forward(self, ids: Tensor) -> Tensor:  # [b, s] -> [b, s, h]
        alone = self.tp_group.size() == 1 and not self.reduce_scatter_embeddings
        # No main_grad: a model that is not trained. Other types of weights are llama.py's without products in place.
        if not (alone and hasattr(self.weight, "main_grad") and self.weight.dtype == torch.float32):
            return super().forward(ids)
        # megatron-core's mark of a table that is also this rank's output layer: autograd would add two gradients of it,
        # so the output layer has to give zeros. Here it has not.
        tied = hasattr(self.weight, "zero_out_wgrad")
        if tied:
            self.weight.zero_out_wgrad = False
        return LookUp.apply(ids, self.weight, tied)


class LookUp(torch.autograd.Function):
    """Rows of a table; the gradient is added to the table's `main_grad`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, tied: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.tied = weight, tied
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:  # type: ignore[override]
        (ids,), weight = ctx.saved_tensors, ctx.weight
        weight.main_grad.index_add_(0, ids.flatten(), grad.flatten(0, -2))
        weight.grad_added_to_main_grad = True
        # A gradient that nobody looks at, as megatron-core's linear layers give it, because its hooks wait for one.
        return None, None if ctx.tied else torch.empty_like(weight), None
