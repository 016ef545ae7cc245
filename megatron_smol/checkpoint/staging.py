"""A moment of the training state, copied to host memory, so that training may go on while it is written.

checkpoint/saving.py writes what is copied here. megatron-core's own way to the `fully_reshardable` form gathers the optimizer on
every data-parallel rank before a save may begin (nine passes over its states, while training waits). Here
each rank copies its own shard, once, and the gathering is left to the thread that writes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_smol.checkpoint.own_part import STATES
from megatron_smol.model.backend import backend


class Staging:
    """Host buffers, kept for the next save: page-locked where they are filled from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}
        self._stream = torch.cuda.Stream() if backend().on_gpu else None
        self._copied: torch.cuda.Event | None = None

    def empty(self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer of that name, with whatever it held."""
        known = self._buffers.get(key)
        if known is None or known.shape != shape or known.dtype != dtype:
            known = torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)
            self._buffers[key] = known
        return known

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies inside the block run beside the GPU's work; the next kernel waits for them, the host does not."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        self._copied = self._stream.record_event()
        torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Return when the copies are there; called by the thread that writes."""
        if self._copied is not None:
            self._copied.synchronize()


class OptimizerShards:
    """This rank's shard of a distributed optimizer, copied, and a place for the whole on data-parallel rank 0."""

    def __init__(self, optimizer: DistributedOptimizer, staging: Staging, name: Hashable) -> None:
        self._optimizer = optimizer
        self._group = optimizer.data_parallel_group_gloo
        self._rank, self._size = self._group.rank(), self._group.size()
        self._parts: list[tuple[Tensor, list[Tensor]]] = []  # (this rank's, every rank's place in the whole)
        self._state: dict[Any, Any] = {"buckets_coalesced": True}
        self._weights: dict[Tensor, Tensor] = {}
        for number, ranges in enumerate(optimizer.gbuf_ranges):
            ((dtype, buckets),) = ranges.items()
            buffer = optimizer.buffers[number]
            whole = {key: self._whole(staging, (name, number, key), buffer.numel) for key in STATES}
            for bucket, bucket_ranges in zip(buffer.buckets, buckets, strict=True):
                shard = bucket.grad_data.numel() // self._size
                mine = {}
                for key in STATES:
                    places = list(whole[key][bucket.offset :][: shard * self._size].split(shard))
                    mine[key] = (
                        places[0]
                        if self._rank == 0
                        else staging.empty((name, number, key, bucket.bucket_id), (shard,), torch.float32)
                    )
                    self._parts.append((mine[key], places))
                for parameter, at in bucket_ranges["param_map"].items():
                    states = optimizer._get_main_param_and_optimizer_states(parameter)
                    local = slice(at["gbuf_local"].start, at["gbuf_local"].end)
                    for key in STATES:
                        mine[key][local].copy_(states[key].detach().flatten(), non_blocking=True)
            self._state[number] = {dtype: whole}
            for parameter, (start, end, _) in buffer.param_index_map.items():
                if parameter.dtype == torch.float32:
                    self._weights[parameter] = whole["param"][start:end].view(parameter.shape)

    def _whole(self, staging: Staging, key: Hashable, size: int) -> Tensor:
        # Laid out as the gradient buffer is, padding included, because megatron-core looks parameters up by their
        # place in it. Other ranks only name the tensors: memory that is never touched is never taken.
        return staging.empty(key, (size,), torch.float32) if self._rank == 0 else torch.empty(size)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside the block megatron-core describes these copies when it is asked for the optimizer's states."""
        own = self._optimizer.__dict__
        own |= {"sharded_state_dict": self._describe, "get_parameter_state_dp_zero": lambda **_: self._state}
        try:
            yield
        finally:
            del own["sharded_state_dict"], own["get_parameter_state_dp_zero"]

    def _describe(self, model: dict[str, Any], is_loading: bool, metadata: dict[str, Any]) -> dict[str, Any]:
        # As megatron-core's method of that name does, less a garbage collection of 0.1 s.
        assert not is_loading
        described: dict[str, Any] = self._optimizer.state_dict()
        described["param_state"] = self._optimizer.sharded_param_state_fully_reshardable(
            model, False, metadata
        )
        described["param_state_sharding_type"] = metadata["distrib_optim_sharding_type"]
        return described

    def weight(self, parameter: Tensor) -> Tensor | None:
        """An fp32 weight is the optimizer's own copy of it, which need not be copied twice."""
        return self._weights.get(parameter)

    def gather(self) -> None:
        """Bring the other ranks' shards to rank 0. Runs beside training, on a process group that training does not use."""
        ranks = torch.distributed.get_process_group_ranks(self._group)
        for mine, places in self._parts:
            if self._rank > 0:
                torch.distributed.send(mine, ranks[0], group=self._group)
                continue
            for rank, place in zip(ranks[1:], places[1:], strict=True):
                torch.distributed.recv(place, rank, group=self._group)


def shards_of(optimizer: MegatronOptimizer, staging: Staging) -> list[OptimizerShards]:
    """Copies of this rank's shards; none where the optimizer is replicated."""
    inner = [one for one in optimizer.chained_optimizers if isinstance(one, DistributedOptimizer)]
    return [OptimizerShards(one, staging, number) for number, one in enumerate(inner)]


def copy_described(described: Any, staging: Staging, name: str, shards: list[OptimizerShards]) -> None:
    """Replace the tensors of a described state, where this rank writes them, by copies."""
    for number, sharded in enumerate(nested_values(described)):
        if not isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            continue
        if not is_main_replica(sharded.replica_id):
            continue
        live = sharded.data
        copied = next((found for one in shards if (found := one.weight(live)) is not None), None)
        if copied is None:
            copied = staging.empty((name, number), tuple(live.shape), live.dtype)
            copied.copy_(live.detach(), non_blocking=True)
        sharded.data = copied
