"""What ran in one step: kernels (operators on the CPU) by time, grouped, those in FP8 marked.

The names are the proof that the precision asked for is the one that computed: an FP8 product shows e4m3 or e5m2 in its kernel's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from megatron_smol.measure.memory import peak_allocation

FP8_NAME = re.compile(r"e4m3|e5m2|fp8|float8|_ue8m0", re.IGNORECASE)
# First match decides.
_GROUPS = (
    ("communication", r"nccl|gloo|c10d|all_reduce|allreduce|all_gather|allgather|reduce_scatter"),
    ("attention", r"attention|flash|fmha|sdpa|cudnn_generated.*sdpa"),
    ("optimizer", r"adam|multi_tensor"),
    ("matrix products", r"gemm|matmul|::mm$|::addmm$|::bmm$|cutlass|xmma|nvjet|cublas|dot_kernel"),
    ("norm", r"rms_?norm|layer_?norm|rsqrt"),
    ("loss", r"cross_entropy|log_softmax|softmax"),
    ("casts and copies", r"copy|cast|transpose|memcpy|memset|fill|zero"),
    ("element-wise", r"elementwise|aten::(mul|add|sub|div|silu|exp|pow|mean|sum)|triton|vectorized"),
)
_PATTERNS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _GROUPS]
SHOWN = 12


@dataclass(frozen=True)
class Kernel:
    """Seconds: on the device, in the whole step."""

    name: str
    group: str
    calls: int
    seconds: float

    @property
    def fp8(self) -> bool:
        return FP8_NAME.search(self.name) is not None


@dataclass(frozen=True)
class Profile:
    """kernels: longest first; peak_cpu_bytes: what the step allocated on the CPU."""

    kernels: tuple[Kernel, ...]
    peak_cpu_bytes: int

    def groups(self) -> dict[str, float]:
        """Seconds by group, longest first."""
        total: dict[str, float] = {}
        for kernel in self.kernels:
            total[kernel.group] = total.get(kernel.group, 0.0) + kernel.seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def fp8(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.fp8)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds_by_group": self.groups(),
            "longest": [vars(kernel) | {"fp8": kernel.fp8} for kernel in self.kernels[:SHOWN]],
            "fp8": [kernel.name for kernel in self.fp8()],
            "fp8_seconds": sum(kernel.seconds for kernel in self.fp8()),
        }


def profile_step(step: Callable[[], object], on_gpu: bool) -> Profile:
    """Run `step` once under the profiler."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with _quiet(), profile(activities=activities, profile_memory=not on_gpu) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [
        Kernel(event.key, group_of(event.key), event.count, _microseconds(event, on_gpu) / 1e6)
        for event in profiled.key_averages()
        if event.device_type == wanted and not event.key.startswith(("[memory]", "ProfilerStep"))
    ]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Profile(tuple(kernels), 0 if on_gpu else peak_allocation(profiled))


def group_of(name: str) -> str:
    """What a kernel or operator of this name does."""
    return next((group for group, pattern in _PATTERNS if pattern.search(name)), "other")


def _microseconds(event: Any, on_gpu: bool) -> float:
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler of torch 2.13 writes a line to standard error whenever it starts and stops."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
