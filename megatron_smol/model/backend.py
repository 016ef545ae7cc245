"""The only seam between CPU and GPU: which device, which collectives, which layers.

On a GPU megatron-core is used as it is, with Transformer Engine's layers when that is installed. Without
one (or with ``SMOL_DEVICE=cpu``) megatron-core 0.16.1 needs help, because it names "cuda" in places that
have nothing to do with CUDA. `use_cpu` gives that help at the narrowest place: it rewrites string constants
inside the functions that need it and answers a handful of `torch.cuda` questions, once, before a model is
built. Nothing is intercepted per operation, so a CPU step costs what PyTorch costs.

Everything here is tied to the pinned megatron-core; another version is refused rather than half-patched.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_smol.errors import UserError

MEGATRON_CORE = "0.16.1"

# Where megatron-core 0.16.1 compares or allocates with a CUDA literal on the path that we use.
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
_CPU_LITERAL = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_LITERALS_EXPECTED = 24  # counted in 0.16.1; another count means another megatron-core


@dataclass(frozen=True)
class Backend:
    """Where this process computes.

    device: torch device of every tensor of the model; collectives: torch.distributed's backend name;
    transformer_engine: whether Transformer Engine's layers are used.
    """

    device: torch.device
    collectives: str
    transformer_engine: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def describe(self) -> str:
        if not self.on_gpu:
            return f"CPU, {torch.get_num_threads()} threads a rank, gloo, SDPA attention"
        layers = "Transformer Engine" if self.transformer_engine else "PyTorch layers, SDPA attention"
        return f"{torch.cuda.get_device_name(self.device)}, NCCL, {layers}"


@cache
def backend() -> Backend:
    """Choose the backend once a process; on CPU also teach megatron-core to live without CUDA."""
    _check_megatron_core()
    wanted = os.environ.get("SMOL_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu":
        use_cpu()
        return Backend(torch.device("cpu"), "gloo", transformer_engine=False)
    if wanted != "cuda" or not torch.cuda.is_available():
        raise UserError(
            f"SMOL_DEVICE={wanted} was asked for, but this machine offers "
            f"{'cuda and cpu' if torch.cuda.is_available() else 'cpu only'}; unset it or set one of those"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return Backend(device, "nccl", transformer_engine=have_transformer_engine())


def have_transformer_engine() -> bool:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return False
    return True


def init_process_group(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the other ranks (torchrun's or srun's environment), or form a world of one.

    A single process uses an in-memory store, so that no port can be taken. OpenMP threads are shared
    out among the ranks of this host, as torchrun sets one thread a rank whatever the cores.
    """
    if torch.distributed.is_initialized():
        return
    here = backend()
    if "RANK" not in os.environ:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(here.collectives, store=store, rank=0, world_size=1)
        return
    if not here.on_gpu:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    try:
        torch.distributed.init_process_group(here.collectives, timeout=timeout)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        words, _, _ = str(error).partition("\n")
        raise UserError(
            f"the ranks could not meet at {address} ({words}); "
            "is the port taken by another job? choose another with torchrun --master-port or MASTER_PORT"
        ) from error


def seed_random_streams(seed: int) -> None:
    """Give every tensor-parallel rank its own stream for dropout-like draws (SmolLM2 has none).

    Initial weights do not come from here: see `model/llama.py`.
    """
    from megatron.core import parallel_state, tensor_parallel

    if backend().on_gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        tensor_parallel.get_cuda_rng_tracker().add("model-parallel-rng", seed + 2718 + rank)


def _check_megatron_core() -> None:
    import megatron.core

    if megatron.core.__version__ != MEGATRON_CORE:
        raise UserError(
            f"megatron-core {megatron.core.__version__} is installed, but this package adapts internals of "
            f"exactly {MEGATRON_CORE}; run `pip install megatron-core=={MEGATRON_CORE}`"
        )


# --- CPU ---------------------------------------------------------------------------------------------------


@cache
def use_cpu() -> None:
    """Make megatron-core compute on the CPU; idempotent, and an error if it is not the code we know."""
    replaced = 0
    for name in _MODULES_WITH_CUDA_LITERALS:
        for function in _functions_of(importlib.import_module(name)):
            function.__code__, count = _without_cuda_literals(function.__code__)
            replaced += count
    if replaced != _LITERALS_EXPECTED:
        raise UserError(
            f"megatron-core has {replaced} CUDA literals where {MEGATRON_CORE} has "
            f"{_LITERALS_EXPECTED}: it was changed; reinstall megatron-core=={MEGATRON_CORE}"
        )
    _answer_cuda_questions()

    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random as mc_random

    from megatron_smol.model.gradients import write_gradients_in_place

    # Two methods move a tensor with `.cuda()`: there the *name* becomes `.cpu()`.
    _call_cpu_for_cuda(LanguageModule.setup_embeddings_and_output_layer)
    _call_cpu_for_cuda(DistributedOptimizer.get_parameter_state_dp_zero)

    _keep_gradients_of_one_rank_in_place()
    write_gradients_in_place()
    # Recomputation puts the random state back; the CPU's is handled beside it.
    mc_random._get_cuda_rng_state = lambda **_: None
    mc_random._set_cuda_rng_state = lambda *_, **__: None
    mc_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    mc_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _answer_cuda_questions() -> None:
    """`torch.cuda` calls that would raise without CUDA and have an obvious answer on the CPU."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def _keep_gradients_of_one_rank_in_place() -> None:
    """Data parallel over one rank moves nothing; gloo would copy all gradients and weights at every step."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    gather, scatter = buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func

    def all_gather(output: Tensor, shard: Tensor, group: Any, async_op: bool = False) -> Any:
        return gather(output, shard, group=group, async_op=async_op) if group.size() > 1 else None

    def reduce_scatter(shard: Tensor, buffer: Tensor, op: Any, group: Any, async_op: bool = False) -> Any:
        return scatter(shard, buffer, op=op, group=group, async_op=async_op) if group.size() > 1 else None

    # The shard of a single rank is a view of the whole buffer.
    buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func = all_gather, reduce_scatter


def _call_cpu_for_cuda(function: types.FunctionType) -> None:
    names = tuple("cpu" if name == "cuda" else name for name in function.__code__.co_names)
    function.__code__ = function.__code__.replace(co_names=names)


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Functions and methods defined in `module`, decorators peeled off."""
    for value in list(vars(module).values()):
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            function = getattr(member, "__func__", member)  # classmethod, staticmethod
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                yield function


def _without_cuda_literals(code: types.CodeType) -> tuple[types.CodeType, int]:
    """`code` with CUDA string constants replaced (nested functions and tuples too), and how many were."""
    count = 0

    def replace(constant: object) -> object:
        nonlocal count
        if isinstance(constant, str) and constant in _CPU_LITERAL:
            count += 1
            return _CPU_LITERAL[constant]
        if isinstance(constant, tuple):
            return tuple(map(replace, constant))
        if isinstance(constant, types.CodeType):
            inner, found = _without_cuda_literals(constant)
            count += found
            return inner
        return constant

    constants = tuple(map(replace, code.co_consts))
    return (code.replace(co_consts=constants) if count else code), count


class CpuRngTracker:
    """Named random streams over the CPU generator: megatron-core's CUDA tracker without CUDA."""

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}

    def is_initialized(self) -> bool:
        return bool(self._states)

    def reset(self) -> None:
        self._states.clear()

    def get_states(self) -> dict[str, Tensor]:
        return dict(self._states)

    def set_states(self, states: dict[str, Tensor]) -> None:
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        self._states[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from stream `name` inside the block; the default stream is untouched outside it."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)
