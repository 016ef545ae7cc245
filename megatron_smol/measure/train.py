"""`smol bench train`: how fast the real engine trains on random tokens, how much memory it takes, and what ran.

Timed is a whole optimizer step as `smol train` takes it (forward, backward, reduction, clipping, AdamW), without reading data: ids are
drawn before. On a GPU by CUDA events, on a CPU by the clock.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_smol.data.batch import MicroBatch
from megatron_smol.errors import RunError, UserError
from megatron_smol.measure.kernels import Profile, profile_step
from megatron_smol.measure.memory import state_bytes
from megatron_smol.measure.setting import Setting
from megatron_smol.model.backend import backend
from megatron_smol.recipe.devices import Device, device_by_cuda_name
from megatron_smol.recipe.flops import flops_per_token
from megatron_smol.recipe.memory import Kernels, Layout, rank_memory
from megatron_smol.recipe.units import format_bytes
from megatron_smol.train.step import Engine

LR = 1e-4
DIFFERENT_STEPS = 4  # batches that are drawn, and used in turn
LIMITS = {"80 GB": 80e9, "141 GB": 141e9}
PACKAGES = ("megatron-smol", "megatron-core", "torch", "transformer-engine", "triton")


def build(setting: Setting) -> Engine:
    """The engine that `smol train` would build for it."""
    training = setting.recipe.training
    return Engine(setting.recipe, training.seq_length, training.rope_base, training.precision)


def measure(setting: Setting, engine: Engine | None = None) -> dict[str, Any]:
    """Run the setting; the result on every rank, as `--json` writes it.

    engine: of the same model, layout and precision, to be used again. Raises RunError when FP8 was asked for and did not run,
    UserError when memory ran out.
    """
    training = setting.recipe.training
    try:
        engine = engine or build(setting)
        engine.configure(training.seq_length, training.rope_base)
        batches = [_random_step(setting, index) for index in range(DIFFERENT_STEPS)]
        seconds, losses = _timed_steps(engine, batches, setting)
        peak = _cuda_peak()
        profiled = profile_step(lambda: engine.train_step(batches[0], LR), backend().on_gpu)
    except torch.OutOfMemoryError as error:
        need = format_bytes(_estimate(setting)["total"])
        raise UserError(
            f"out of memory at micro-batch {training.micro_batch} x {training.seq_length} tokens (estimated need {need}); "
            "take a smaller --micro-batch, or recompute=full in --layout"
        ) from error
    _require_fp8(training.precision, profiled)
    states = state_bytes(engine)
    allocated = peak.get("allocated") or sum(states.values()) + profiled.peak_cpu_bytes
    held = peak.get("reserved") or allocated  # by the allocator, gaps included: what must fit
    memory = {
        "peak": allocated,
        "held": held,
        "fits": {name: held < size for name, size in LIMITS.items()},
        "states": states,
        "estimated": _estimate(setting),
    }
    return {
        "bench_version": 1,
        **_described(setting),
        "step_seconds": _spread(seconds),
        **_rates(setting, seconds),
        "losses": losses,
        "memory_bytes": memory,
        "kernels": profiled.to_json(),
    }


# --- the steps ---------------------------------------------------------------------------------------------


def _random_step(setting: Setting, index: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of random ids; alike on the ranks that share them."""
    recipe, rank = setting.recipe, parallel_state.get_data_parallel_rank()
    micro, count = recipe.training.micro_batch, _layout(setting).micro_batches(recipe.training)
    generator = torch.Generator().manual_seed(1000 * index + rank)
    shape = (count, micro, recipe.training.seq_length + 1)
    ids = torch.randint(recipe.model.vocab_size, shape, generator=generator)
    return [MicroBatch.of(one.numpy(), backend().device) for one in ids]


def _timed_steps(
    engine: Engine, batches: list[list[MicroBatch]], setting: Setting
) -> tuple[list[float], dict[str, float]]:
    """Seconds of each timed step, and the first and last loss."""
    clock = _cuda_seconds if backend().on_gpu else _cpu_seconds
    seconds, losses = [], []
    for index in range(setting.warmup + setting.steps):
        if index == setting.warmup and backend().on_gpu:
            torch.cuda.reset_peak_memory_stats()
        batch = batches[index % len(batches)]
        took = clock(lambda batch=batch: losses.append(engine.train_step(batch, LR).loss))  # type: ignore[misc]
        _say(f"step {index + 1} of {setting.warmup + setting.steps}: {took:.3f} s, loss {losses[-1]:.4f}")
        if index >= setting.warmup:
            seconds.append(took)
    return seconds, {"first": losses[0], "last": losses[-1]}


def _cuda_seconds(work: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _cuda_peak() -> dict[str, int]:
    if not backend().on_gpu:
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def _require_fp8(precision: str, profiled: Profile) -> None:
    """The precision law, by what ran and not by what was asked for."""
    if precision.startswith("fp8") and not profiled.fp8():
        raise RunError(
            f"precision '{precision}' was asked for, and no kernel with e4m3, e5m2 or fp8 in its name ran: this was not FP8; "
            "run `smol doctor`, and report this with the versions it prints"
        )


def _say(text: str) -> None:
    """Progress, from one rank."""
    if torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


# --- the result --------------------------------------------------------------------------------------------


def _layout(setting: Setting) -> Layout:
    return Layout.of(setting.recipe.parallel)


def kernels_here() -> Kernels:
    """Which of recipe/memory.py's formulas are for this machine."""
    here = backend()
    return "te" if here.transformer_engine else "torch" if here.on_gpu else "cpu"


def _estimate(setting: Setting) -> dict[str, float]:
    """Of this rank, for comparison."""
    recipe = setting.recipe
    position = parallel_state.get_pipeline_model_parallel_rank()
    estimated = rank_memory(recipe.model, _layout(setting), recipe.training, position, kernels_here())
    return {**asdict(estimated), "total": estimated.total}


def _described(setting: Setting) -> dict[str, Any]:
    recipe, training = setting.recipe, setting.recipe.training
    return {
        "name": setting.name,
        "parameters": recipe.model.parameters(),
        "model": recipe.model.model_dump(),
        "layout": asdict(_layout(setting)),
        "precision": training.precision,
        "seq_length": training.seq_length,
        "micro_batch": training.micro_batch,
        "global_batch": training.global_batch,
        "micro_batches": _layout(setting).micro_batches(training),
        "steps": setting.steps,
        "warmup": setting.warmup,
        "device": _device(),
        "backend": backend().describe(),
        "versions": _versions(),
    }


def _device() -> dict[str, Any]:
    """name: as the machine calls it; table: the entry of recipe/devices.py, None for a CPU and unknown GPUs."""
    here = backend()
    if not here.on_gpu:
        return {
            "name": platform.processor() or platform.machine(),
            "table": None,
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(here.device)
    known = device_by_cuda_name(properties.name)
    return {
        "name": properties.name,
        "table": known and known.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if backend().on_gpu:
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _spread(values: list[float]) -> dict[str, float | int]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "stdev": statistics.pstdev(values),
        "steps": len(values),
    }


def _rates(setting: Setting, seconds: list[float]) -> dict[str, Any]:
    """tokens/s of all ranks and of one, FLOP/s in both conventions, and as shares of the device's peak where it is known."""
    recipe, training, layout = setting.recipe, setting.recipe.training, _layout(setting)
    tokens = training.global_batch * training.seq_length
    per_rank = [tokens / s / layout.ranks for s in seconds]
    known = device_by_cuda_name(torch.cuda.get_device_name()) if backend().on_gpu else None
    flops = {
        name: flops_per_token(recipe.model, training.seq_length, causal)
        for name, causal in (("causal", True), ("full", False))
    }
    median = statistics.median(per_rank)
    return {
        "tokens_per_step": tokens,
        "tokens_per_second": _spread([tokens / s for s in seconds]),
        "tokens_per_second_per_gpu": _spread(per_rank),
        "flops_per_token": flops,
        "flops_per_second_per_gpu": {name: count * median for name, count in flops.items()},
        "mfu": {
            kind: {name: count * median / peak for name, count in flops.items()}
            for kind, peak in _peaks(known, training.precision).items()
        },
    }


def _peaks(device: Device | None, precision: str) -> dict[str, float]:
    """FP8 runs are set against the bf16 peak too, which is how most people print them."""
    if device is None:
        return {}
    kinds = ["fp32"] if precision == "fp32" else ["bf16"]
    if precision.startswith("fp8") and device.fp8_flops is not None:
        kinds.append("fp8")
    return {kind: device.peak_flops(kind) for kind in kinds}
