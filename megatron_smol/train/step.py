"""One optimizer step through megatron-core: forward and backward by its schedules, reduce, clip, update.

`Engine` owns the living model of this rank. The stage controller tells it what changes (RoPE base,
sequence length, precision); the trainer feeds it micro-batches. It knows nothing of stages or files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_smol.data.batch import IGNORED, MicroBatch
from megatron_smol.errors import UserError
from megatron_smol.model.backend import backend, init_process_group, seed_random_streams
from megatron_smol.model.context_parallel import local_part
from megatron_smol.model.gradients import finish_products
from megatron_smol.model.llama import build_model, set_rope_base
from megatron_smol.model.packing import packed, packs
from megatron_smol.model.precision import precision as lookup_precision
from megatron_smol.recipe.plan import StagePlan
from megatron_smol.recipe.schema import Parallel, Recipe
from megatron_smol.train.optim import build_optimizer, clip_gradients, ddp_config, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats per token over the global batch; grad_norm: global L2 norm before clipping.

    applied: whether the weights were changed. own_seconds: this rank's own forward and backward, up to where the step
    waits for data-parallel ranks.
    """

    loss: float
    grad_norm: float
    applied: bool = True
    own_seconds: float = 0.0


# Of a batch that was read and not computed.
SKIPPED = StepResult(math.nan, math.nan, applied=False)


def init_parallel(tp: int, pp: int, cp: int = 1, vpp: int = 1, timeout_seconds: float = 600.0) -> None:
    """Join the ranks and cut them into tensor-, pipeline-, context- and data-parallel groups.

    A collective that waits longer than `timeout_seconds` for other ranks is an error.
    """
    init_process_group(timedelta(seconds=timeout_seconds))
    world = torch.distributed.get_world_size()
    if world % (tp * pp * cp):
        raise UserError(
            f"{world} ranks cannot be divided into tp {tp} x pp {pp} x cp {cp}; start a multiple of {tp * pp * cp} "
            "ranks, or change parallel.tp, parallel.pp or parallel.cp"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            context_parallel_size=cp,
            distributed_timeout_minutes=timeout_seconds / 60,  # type: ignore[arg-type]
        )


def check_virtual_pipeline(parallel: Parallel, stage: StagePlan) -> None:
    """Refuse a stage whose micro-batches a virtual pipeline cannot take in groups of `pp`."""
    micro_batches = stage.global_batch // (stage.micro_batch * parallel_state.get_data_parallel_world_size())
    if parallel.vpp > 1 and micro_batches % parallel.pp:
        raise UserError(
            f"stage '{stage.name}' has {micro_batches} micro-batches a rank and step, and parallel.vpp "
            f"{parallel.vpp} needs a multiple of parallel.pp ({parallel.pp}); change micro_batch, global_batch or the "
            "number of ranks, or set vpp: 1"
        )


class Engine:
    """This rank's model (its parts, where the pipeline is virtual), gradient buffers and optimizer."""

    def __init__(self, recipe: Recipe, seq_length: int, rope_base: float, precision: str) -> None:
        parallel = recipe.parallel
        init_parallel(parallel.tp, parallel.pp, parallel.cp, parallel.vpp, recipe.guard.collective_timeout)
        seed_random_streams(recipe.seed)
        self.recipe = recipe
        self.seq_length, self.rope_base, self.precision = seq_length, rope_base, precision
        self._build()

    def _build(self) -> None:
        """(Re)build model and optimizer for the current precision, with the initial weights."""
        precision, parallel = lookup_precision(self.precision, self.recipe.fp8), self.recipe.parallel
        gpts = build_model(
            self.recipe.model, parallel, precision, self.seq_length, self.rope_base, self.recipe.seed
        )
        config = gpts[0].config
        overlap = parallel.overlap
        if overlap is None:
            overlap = backend().on_gpu and parallel_state.get_data_parallel_world_size() > 1
        ddp = ddp_config(overlap, parallel.distributed_optimizer, precision.fields.get("fp8_param", False))
        self.parts = [
            # Gradients of one part are reduced while the next is computed; a single part does it bucket by bucket.
            DistributedDataParallel(
                config, ddp, Float16Module(config, gpt) if precision.bf16 else gpt, disable_bucketing=part > 0
            )
            for part, gpt in enumerate(gpts)
        ]
        self.optimizer = build_optimizer(self.parts, self.recipe.optimizer, precision)
        config.finalize_model_grads_func = self._finalize_gradients
        config.no_sync_func = _one_or_all([part.no_sync for part in self.parts])
        config.grad_scale_func = self.optimizer.scale_loss
        if overlap:
            config.grad_sync_func = _one_or_all([part.start_grad_sync for part in self.parts])
            if parallel.distributed_optimizer:
                config.param_sync_func = _one_or_all([part.start_param_sync for part in self.parts])
        self._forward_backward = get_forward_backward_func()

    @property
    def gpts(self) -> list[GPTModel]:
        """This rank's parts of the model: one, or `parallel.vpp`."""
        return [unwrap_model(part) for part in self.parts]

    @property
    def gpt(self) -> GPTModel:
        """The only part, where the pipeline is not virtual."""
        (gpt,) = self.gpts
        return gpt

    def configure(self, seq_length: int, rope_base: float) -> None:
        """Enter a stage of the same precision: positions and shapes change, weights and moments stay."""
        if rope_base != self.rope_base:
            for gpt in self.gpts:
                set_rope_base(gpt, rope_base)
        self.seq_length, self.rope_base = seq_length, rope_base

    def rebuild(self, precision: str) -> None:
        """Change precision: a new model and optimizer, whose state the caller loads from a checkpoint."""
        del self.parts, self.optimizer  # before the new ones, or both would be in memory
        self.precision = precision
        self._build()

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        lr: float,
        admit: Callable[[StepResult], bool] = lambda result: True,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one AdamW update at `lr` if `admit` agrees.

        `admit` sees loss and gradient norm, the same on all ranks, before clipping or the optimizer touch anything: what
        it refuses leaves weights and moments bit for bit as they were (0 x NaN is NaN, so no scale could).
        """
        for part in self.parts:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_learning_rate(self.optimizer, lr)
        self._begun = _moment()
        loss = self._run(batches, forward_only=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        result = StepResult(loss, grad_norm, own_seconds=_seconds_between(self._begun, self._ready))
        if not admit(result):
            return replace(result, applied=False)
        self._update(grad_norm)
        return result

    def _update(self, grad_norm: float) -> None:
        """The rest of megatron-core's `ChainedOptimizer.step`: clip, AdamW, gather the weights."""
        if (limit := self.recipe.optimizer.clip) > 0:
            for optimizer in self.optimizer.chained_optimizers:
                clip_gradients(optimizer, limit, grad_norm)
        self.optimizer.step_with_ready_grads()

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """megatron-core's reduction of gradients over ranks; what comes before it is this rank's own work."""
        self._ready = _moment()
        for part in self.parts:
            finish_products(part.params_with_grad)
        finalize_model_grads(*args, **kwargs)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean nats per token over every data-parallel rank's micro-batches; changes nothing."""
        return self._run(batches, forward_only=True)

    def _run(self, batches: Sequence[MicroBatch], forward_only: bool) -> float:
        if not batches:  # a validation set smaller than the number of data-parallel ranks
            return _mean_over_ranks([])
        # While training, every rank has batches of the same sources: all ask, or none.
        share = None if forward_only or batches[0].real_tokens is None else _tokens_per_micro_batch(batches)
        # A virtual pipeline takes micro-batches in groups of pp; what fills the last group is not counted.
        pp = self.recipe.parallel.pp if len(self.parts) > 1 and forward_only else 1
        fillers = [batches[-1]] * (-len(batches) % pp)
        rows = batches[0].tokens.size(0)
        losses = self._forward_backward(
            forward_step_func=partial(_forward_step, tokens_per_micro_batch=share),
            # Every part of a virtual pipeline asks for each micro-batch.
            data_iterator=_one_or_all([iter([*batches, *fillers]) for _ in self.parts]),
            model=self.parts,
            num_microbatches=len(batches) + len(fillers),
            seq_length=self.seq_length * (rows if packs(batches[0]) else 1),
            micro_batch_size=1 if packs(batches[0]) else rows,
            forward_only=forward_only,
        )
        return _mean_over_ranks(losses[: len(batches)])


def _forward_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module, tokens_per_micro_batch: float | None
) -> tuple[Tensor, Any]:
    batch = next(batches)
    tokens, labels, mask = _part_of_window(batch)
    bounds = None
    if packs(batch):
        assert batch.documents is not None
        mask = None
        tokens, labels, bounds = packed(tokens, labels, batch.documents)
    # [b, s / cp] (packed: [1, b * s]) on the last pipeline stage
    per_token = model(tokens, None, mask, labels=labels, packed_seq_params=bounds)
    if batch.real_tokens is None:
        return per_token, _mean_loss
    return per_token, partial(_masked_loss, labels=labels, share=tokens_per_micro_batch)


def _part_of_window(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens and labels [b, s / cp] of this context-parallel rank, and what its tokens may look at [b, 1, s / cp, s]."""
    cp, rank = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    mask = batch.mask
    if cp == 1:
        return batch.tokens, batch.labels, mask
    tokens, labels = (local_part(x, 1, cp, rank) for x in (batch.tokens, batch.labels))
    return tokens, labels, None if mask is None else local_part(mask, 2, cp, rank)


def _moment() -> Any:
    """Now, on the clock of the device: on a GPU, when it gets there."""
    if not backend().on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(begun: Any, ready: Any) -> float:
    return float(begun.elapsed_time(ready)) / 1e3 if backend().on_gpu else float(ready - begun)


def _one_or_all(items: list[Any]) -> Any:
    """megatron-core wants a list where the pipeline is virtual, and the thing itself where it is not."""
    return items if len(items) > 1 else items[0]


def _mean_loss(per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = per_token.float().mean()
    # The context-parallel ranks of a window each hold a part of its mean; megatron-core adds them up. It also scales
    # the loss in place, hence the copy.
    report = {"loss": loss.detach().clone(), "weight": torch.ones_like(loss)}
    return loss / parallel_state.get_context_parallel_world_size(), report


def _masked_loss(per_token: Tensor, labels: Tensor, share: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Labels that are IGNORED count neither in the loss nor in what it is divided by.

    Dividing by the real tokens of an average micro-batch, not by this one's own, weighs all real tokens of the
    global batch alike.
    """
    counts = labels != IGNORED
    total = torch.where(counts, per_token.float(), 0.0).sum()
    return total / (share or 1.0), {"loss": total.detach().clone(), "weight": counts.sum()}


def _tokens_per_micro_batch(batches: Sequence[MicroBatch]) -> float:
    """Real tokens of the global batch over its micro-batches, the same number on every rank."""
    real = sum(batch.real_tokens or 0 for batch in batches)
    counts = torch.tensor([real, len(batches)], dtype=torch.float64, device=backend().device)
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return max(float(counts[0]), 1.0) / float(counts[1])


def _mean_over_ranks(losses: list[dict[str, Tensor]]) -> float:
    """Mean over micro-batches and data-parallel ranks, by their weights; the same number on every rank.

    Only the last pipeline stage has losses; the tensor-parallel ranks of it hold equal copies.
    """
    total = torch.zeros(2, dtype=torch.float64, device=backend().device)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[0] = torch.stack([entry["loss"] for entry in losses]).double().sum()
        total[1] = torch.stack([entry["weight"] for entry in losses]).double().sum()
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])
