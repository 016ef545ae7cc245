"""Bytes of tensors that a living engine holds and that one of its steps allocates, counted, not estimated.

Used by `smol bench train` on the CPU, and to hold recipe/memory.py against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_smol.data.batch import MicroBatch
from megatron_smol.train.step import Engine

# gloo lets go of a tensor some time after its ranks have met, so that several steps differ; the least is the step's own.
PEAKS = 5


@dataclass(frozen=True)
class TensorBytes:
    """Of this rank. saved: kept by autograd for the backward pass of one micro-batch (under vpp: of pp), weights not counted; peak: the most that one
    step has allocated at a time, on top of weights, gradients and optimizer."""

    weights: int
    gradients: int
    optimizer: int
    saved: int
    peak: int


def count_bytes(engine: Engine, batches: Sequence[MicroBatch], lr: float = 1e-4) -> TensorBytes:
    """Take steps on `batches` (the first to warm up) and count. The engine is changed by them. CPU only."""
    engine.train_step(batches, lr)
    weights = _storages(p for part in engine.parts for p in part.parameters())
    # Keep what was seen, so that no address is used twice.
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    parallel = engine.recipe.parallel
    few = batches[: parallel.pp if parallel.vpp > 1 else 1]  # a virtual pipeline takes a round of them
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.train_step(few, lr)
    saved_bytes = sum(_storages(saved.values()).values())
    saved.clear()
    states = state_bytes(engine)
    peak = min(peak_of_step(engine, batches, lr) for _ in range(PEAKS))
    return TensorBytes(**states, saved=saved_bytes, peak=peak)


def state_bytes(engine: Engine) -> dict[str, int]:
    """weights, gradients, optimizer: bytes that lie there between steps."""
    weights = _storages(p for part in engine.parts for p in part.parameters())
    optimizer = _storages(_optimizer_tensors(engine))
    return {
        "weights": sum(weights.values()),
        "gradients": sum(_storages(_gradients(engine)).values()),
        "optimizer": sum(size for address, size in optimizer.items() if address not in weights),
    }


def peak_of_step(engine: Engine, batches: Sequence[MicroBatch], lr: float) -> int:
    """The most bytes that the CPU allocator gave out at a time in one step, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.train_step(batches, lr)
    return peak_allocation(profiled)


def peak_allocation(profiled: profile) -> int:
    """From a profile taken with profile_memory: the most bytes allocated at a time on the CPU."""
    assert profiled.profiler is not None
    results: Any = profiled.profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak


def _gradients(engine: Engine) -> Iterator[Tensor]:
    for part in engine.parts:
        for buffer in (*part.buffers, *part.expert_parallel_buffers):
            yield buffer.grad_data


def _optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Moments and fp32 copies; what is a view of the weights is left out by the caller."""
    for chained in engine.optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            yield from group["params"]
        for state in chained.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind the tensors, each once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found
