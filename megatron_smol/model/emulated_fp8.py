"""FP8 rounding without FP8 hardware: what the linear layers' products would be given, computed in fp32.

Not FP8: nothing is faster or smaller. It answers one question on a CPU, whether a model trains under a recipe's rounding. Each
linear layer's three products (forward, gradient of the input, gradient of the weight) take operands that went
through torch's float8 types with the scaling of Transformer Engine 2.11's recipe (`transformer_engine/common/recipe`):

tensorwise  one scale a tensor, from its own largest magnitude; E4M3 forward, E5M2 gradients
delayed     one scale a tensor, from the largest magnitude of the last 1024 micro-batches: a sudden outlier is cut off
blockwise   one power-of-two scale a block along the product's inner dimension, 1x128 for activations and gradients,
            128x128 for weights; E4M3

model/llama.py calls `emulate` on a built model. Where it is not asked for, no layer is touched.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_smol.model.precision import Precision

BLOCK = 128
AMAX_HISTORY = "fp8_amax_history"


def emulate(gpt: GPTModel, precision: Precision) -> None:
    """Make the linear layers of `gpt` round as `precision` asks, but for those that stay in bf16."""
    assert precision.emulated is not None
    spared = precision.bf16_layers(gpt.config.num_layers)
    for layer in gpt.decoder.layers:
        if layer.layer_number - 1 in spared:
            continue
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module._forward_impl = partial(_linear, rounding_of(precision.emulated, module))


def _linear(
    rounding: Rounding,
    input: Tensor,
    weight: Tensor,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    **_: Any,
) -> Tensor:
    """In place of megatron-core's function, with its communication. input: [s, b, in] -> [s, b, out]."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input)
    out: Tensor = _Products.apply(input, weight, rounding, torch.is_grad_enabled())
    return out


class _Products(torch.autograd.Function):
    """y = x w^T and its two gradients, of rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Rounding, training: bool) -> Tensor:
        rows, wide = x.flatten(0, -2).float(), weight.float()  # [tokens, in], [out, in]
        rounded_weight = rounding.round("weight", wide, 1)
        out = rounding.round("input", rows, 1) @ rounded_weight.t()
        if training:
            # The gradient of the weight sums over tokens.
            ctx.save_for_backward(rounding.round("input", rows, 0), rounded_weight)
            ctx.rounding, ctx.shape, ctx.dtypes = rounding, x.shape, (x.dtype, weight.dtype)
            rounding.remember("input", rows)
            rounding.remember("weight", wide)
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        rows = grad.flatten(0, -2).float()  # [tokens, out]
        grad_input = rounding.round("gradient", rows, 1) @ weight
        grad_weight = rounding.round("gradient", rows, 0).t() @ x
        rounding.remember("gradient", rows)
        return grad_input.to(ctx.dtypes[0]).view(ctx.shape), grad_weight.to(ctx.dtypes[1]), None, None


# --- scaling -----------------------------------------------------------------------------------------------


class Rounding:
    """How the operands of one linear layer's products are scaled and rounded."""

    def __init__(self, fields: dict[str, Any]) -> None:
        gradients = {"hybrid": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}[fields["fp8"]]
        self.kinds = {"input": torch.float8_e4m3fn, "weight": torch.float8_e4m3fn, "gradient": gradients}

    def round(self, operand: str, x: Tensor, inner: int) -> Tensor:
        """x: [rows, columns] fp32, of a product that sums over dimension `inner`; the same, rounded, in fp32."""
        raise NotImplementedError

    def remember(self, operand: str, x: Tensor) -> None:
        """A micro-batch of training has used this operand."""


class Tensorwise(Rounding):
    """One scale a tensor, its own."""

    def round(self, operand: str, x: Tensor, inner: int) -> Tensor:
        kind = self.kinds[operand]
        return _rounded(x, _scale(x.abs().amax(), kind), kind)


class Delayed(Rounding):
    """One scale a tensor, from what was seen before."""

    def __init__(self, fields: dict[str, Any], module: nn.Module) -> None:
        super().__init__(fields)
        self._module = module
        # A buffer, so that it is in every checkpoint and a resumed run rounds alike.
        module.register_buffer(AMAX_HISTORY, torch.zeros(len(self.kinds), fields["fp8_amax_history_len"]))

    def _history(self, operand: str) -> Tensor:
        history: Tensor = getattr(self._module, AMAX_HISTORY)
        return history[list(self.kinds).index(operand)]

    def round(self, operand: str, x: Tensor, inner: int) -> Tensor:
        kind = self.kinds[operand]
        return _rounded(x, _scale(self._history(operand).float().amax(), kind), kind)

    def remember(self, operand: str, x: Tensor) -> None:
        """Add the largest magnitude, over all ranks that share the layer, and drop the oldest."""
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        amax, history = x.abs().amax(), self._history(operand)
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
        history.copy_(torch.cat([history[1:], amax.to(history.dtype)[None]]))


class Blockwise(Rounding):
    """A power-of-two scale a block."""

    def round(self, operand: str, x: Tensor, inner: int) -> Tensor:
        height, width = (BLOCK, BLOCK) if operand == "weight" else (1, BLOCK) if inner == 1 else (BLOCK, 1)
        rows, columns = x.shape
        padded = nn.functional.pad(x, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [., height, ., width]
        kind = self.kinds[operand]
        scale = _scale(blocks.abs().amax((1, 3), keepdim=True), kind)
        rounded = _rounded(blocks, torch.exp2(torch.floor(torch.log2(scale))), kind)
        return rounded.flatten(2, 3).flatten(0, 1)[:rows, :columns]


def rounding_of(fields: dict[str, Any], module: nn.Module) -> Rounding:
    """What a precision's FP8 fields ask of one linear layer."""
    if fields["fp8_recipe"] == "delayed":
        return Delayed(fields, module)
    return {"tensorwise": Tensorwise, "blockwise": Blockwise}[fields["fp8_recipe"]](fields)


def _scale(amax: Tensor, kind: torch.dtype) -> Tensor:
    """The largest magnitude becomes the format's largest number; 1 where there is nothing to go by."""
    scale = torch.finfo(kind).max / amax
    return torch.where(torch.isfinite(scale) & (amax > 0), scale, torch.ones_like(scale))


def _rounded(x: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """To the nearest FP8 number; beyond the largest, the largest, as the hardware does."""
    largest = torch.finfo(kind).max
    return (x * scale).clamp_(-largest, largest).to(kind).float() / scale
