"""Seconds of one optimizer step on GPUs, from a roofline: what each part computes, moves and sends, at reachable rates.

Read by `estimate` (days, GPU-hours) and `fit` (which layout is fastest). REACHED are shares of a data sheet's figures; what the
sum leaves out (gaps between kernels, clocks under load, the data path) is one number, EFFICIENCY, fitted to published
runs and replaced by a measurement of `smol bench train` where there is one (`Calibration.from_file`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_smol.errors import UserError
from megatron_smol.recipe.devices import DEVICES, Device
from megatron_smol.recipe.memory import (
    Batches,
    Layout,
    Work,
    linear_weights_per_layer,
    rank_parameters,
)
from megatron_smol.recipe.schema import Model
from megatron_smol.recipe.traffic import Traffic, traffic


@dataclass(frozen=True)
class Reached:
    """Shares of the data sheet. Assumptions, each with what it comes from."""

    gemm: float = (
        0.66  # 650 of 989 TFLOP/s: bf16 products of a 1-2B model's shapes on an H200; 8192 cubed reaches 0.80
    )
    gemm_fp8: float = 0.56  # 1100 of 1979
    attention_forward: float = 0.40  # 400 of 989: cuDNN's causal kernel at head width 64
    attention_backward: float = 0.33
    memory: float = 0.88  # copies: 4.3 of 4.8 TB/s on an H200, 2.9 of 3.35 on an H100
    link: float = 0.78  # 350 of 450 GB/s, NCCL's bus bandwidth of large all-reduces on NVLink
    network: float = 0.85
    hidden: float = 0.9  # of data-parallel communication that could run behind computation
    host_seconds_per_layer: float = 0.3e-3  # launching a layer's kernels, forward and backward; assumed


REACHED = Reached()
# What ten published runs reached of the sum (tests/recipe/test_speed.py): 0.62 to 1.12, in the middle 0.73.
EFFICIENCY = 0.73


@dataclass(frozen=True)
class Calibration:
    """efficiency: measured over modelled speed, by precision; what is not measured takes EFFICIENCY."""

    efficiency: dict[str, float] = field(default_factory=dict)
    source: str = "modelled, fitted to published runs"

    def of(self, precision: str) -> float:
        return self.efficiency.get(precision, EFFICIENCY)

    @classmethod
    def from_file(cls, path: Path) -> Calibration:
        """From what `smol bench train --json` wrote on a GPU: its speed over the model's for the same work."""
        try:
            found = json.loads(path.read_text())
            model = Model.model_validate(found["model"])
            layout = Layout(**{name: found["layout"][name] for name in ("tp", "pp", "cp", "vpp", "dp")})
            work = Batches(
                **{n: found[n] for n in ("seq_length", "micro_batch", "global_batch", "precision")}
            )
            tokens, name = float(found["tokens_per_second_per_gpu"]["median"]), found["device"]["table"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a result of `smol bench train --json` ({type(error).__name__}: {error}); measure one "
                "on a GPU, or leave the option out"
            ) from None
        if name not in DEVICES:
            raise UserError(
                f"{path} was measured on {found['device'].get('name', 'a CPU')}, which is not among {', '.join(DEVICES)}; "
                "measure on one of these"
            )
        ideal = step_time(model, layout, work, DEVICES[name], Calibration({work.precision: 1.0}))
        return cls({work.precision: tokens / ideal.tokens_per_second_per_gpu}, f"measured, {path.name}")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank."""

    compute: float
    tensor: float  # communication that nothing hides
    context: float
    pipeline: float
    uneven: float  # the last pipeline rank has the output layer besides, and the others wait for it
    bubble: float  # pipeline ranks waiting at the step's ends
    data: float
    optimizer: float
    tokens: int
    ranks: int
    traffic: Traffic

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """By name for people, in seconds."""
        return {
            "compute": self.compute,
            "tensor-parallel communication": self.tensor,
            "context-parallel communication": self.context,
            "pipeline communication": self.pipeline,
            "the output layer on the last pipeline rank": self.uneven,
            "pipeline bubble": self.bubble,
            "data-parallel communication": self.data,
            "optimizer": self.optimizer,
        }

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.total / self.ranks


def step_time(
    model: Model, layout: Layout, work: Work, device: Device, calibration: Calibration | None = None
) -> StepTime:
    """One optimizer step: micro-batches through the slowest pipeline rank, the bubble, communication, the update."""
    efficiency = (calibration or Calibration()).of(work.precision)
    micro_batches, sent = layout.micro_batches(work), traffic(model, layout, work)
    one = _micro_batch_seconds(model, layout, work, device) / efficiency
    even = one - (layout.pp - 1) / layout.pp * _output_seconds(model, layout, work, device) / efficiency
    tensor = sent.tensor / _rate(device, layout.tp, 1)
    context = sent.context / _rate(device, layout.cp, layout.tp)
    # Attention of a ring's own keys runs while the next ones travel; gathering waits.
    context *= 0.3 if layout.cp_comm == "ring" else 1.0
    pipeline = sent.pipeline / _rate(device, layout.pp, layout.tp * layout.cp * layout.dp)
    busy = one + (tensor + context) / micro_batches
    return StepTime(
        compute=even * micro_batches,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        uneven=(one - even) * micro_batches,
        bubble=(layout.pp - 1) / layout.vpp * busy,
        data=_exposed_data(layout, sent, device, one),
        optimizer=_optimizer_seconds(model, layout, work, device) / efficiency,
        tokens=work.global_batch * work.seq_length,
        ranks=layout.ranks,
        traffic=sent,
    )


def _micro_batch_seconds(model: Model, layout: Layout, work: Work, device: Device) -> float:
    """Forward and backward of one micro-batch on the last pipeline rank, which has the output layer."""
    tokens, layers = layout.tokens(work), model.layers // layout.pp
    layer = tokens * _layer_seconds_per_token(model, layout, work, device)
    # Read the gradient and the buffer, write the buffer.
    parameters = rank_parameters(model, layout, layout.pp - 1)
    accumulate = (8 + _width(work)) * parameters / _memory_rate(device)
    on_device = layers * layer + _output_seconds(model, layout, work, device) + accumulate
    return max(on_device, layers * REACHED.host_seconds_per_layer)


def _output_seconds(model: Model, layout: Layout, work: Work, device: Device) -> float:
    """The output layer and the loss of a micro-batch: bf16 products under FP8 too, four passes over the logits."""
    tokens, logits = layout.tokens(work), model.vocab_size / layout.tp
    products = 6 * model.hidden_size * logits / (_plain_flops(device, work) * REACHED.gemm)
    return tokens * (products + 4 * _width(work) * logits / _memory_rate(device))


def _layer_seconds_per_token(model: Model, layout: Layout, work: Work, device: Device) -> float:
    """Products, attention and element-wise traffic of a layer.

    Attention: 2*h*s forward, causal half, and 2.5 times that backward. Element-wise, in elements read and written forward and
    backward: SwiGLU 8f, rotary 8h, norms and residuals 21h. FP8 casts move 5 bytes for each of 8h + 3f elements.
    """
    h, f = model.hidden_size, model.ffn_size
    passes = 4 if layout.recompute == "full" else 3
    linear = passes * 2 * linear_weights_per_layer(model) / layout.tp / _gemm_rate(model, work, device)
    attention = 2 * h * work.seq_length / layout.tp / _plain_flops(device, work)
    again = attention if layout.recompute != "none" else 0.0
    attended = (attention + again) / REACHED.attention_forward + 2.5 * attention / REACHED.attention_backward
    elements = (8 * f + 8 * h) / layout.tp + 21 * h / layout.residual_split
    moved = _width(work) * elements * passes / 3
    if work.precision.startswith("fp8"):
        moved += 5 * (8 * h + 3 * f) / layout.tp
    return linear + attended + moved / _memory_rate(device)


def _gemm_rate(model: Model, work: Work, device: Device) -> float:
    """FLOP/s of the linears; under `fp8-tensorwise` the first and the last layer are bf16."""
    plain = _plain_flops(device, work) * REACHED.gemm
    if not work.precision.startswith("fp8"):
        return plain
    fast = device.peak_flops(work.precision) * REACHED.gemm_fp8
    slow_share = min(2 / model.layers, 1.0) if work.precision == "fp8-tensorwise" else 0.0
    return 1 / (slow_share / plain + (1 - slow_share) / fast)


def _optimizer_seconds(model: Model, layout: Layout, work: Work, device: Device) -> float:
    """AdamW's traffic over the shard: gradient, moments and fp32 copy read, the last three and the weight written."""
    parameters = max(rank_parameters(model, layout, position) for position in (0, layout.pp - 1))
    shards = layout.dp * layout.cp if layout.distributed_optimizer else 1
    per_weight = 28 if work.precision == "fp32" else 30
    return per_weight * parameters / shards / _memory_rate(device)


def _exposed_data(layout: Layout, sent: Traffic, device: Device, one: float) -> float:
    """Gradients are reduced behind the last micro-batch's backward pass, weights gathered behind the first forward."""
    rate = _rate(device, layout.dp * layout.cp, layout.tp)
    exposed = 0.0
    for volume, cover in ((sent.gradients, one * 2 / 3), (sent.parameters, one / 3)):
        seconds = volume / rate
        exposed += seconds - min(seconds, cover) * REACHED.hidden
    return exposed


def _rate(device: Device, members: int, stride: int) -> float:
    """Bytes per second a rank sends to a group of `members` ranks, `stride` ranks apart (megatron-core's order: tp, cp, dp, pp).

    A group that leaves the node sends through the cards of all its members there.
    """
    link = device.link_rate * REACHED.link
    if members * stride <= device.gpus_per_node:
        return link
    in_node = max(1, min(members, device.gpus_per_node // stride))
    return min(link, in_node * device.network_rate * REACHED.network)


def _plain_flops(device: Device, work: Work) -> float:
    return device.fp32_flops if work.precision == "fp32" else device.bf16_flops


def _memory_rate(device: Device) -> float:
    return device.memory_rate * REACHED.memory


def _width(work: Work) -> int:
    return 4 if work.precision == "fp32" else 2
