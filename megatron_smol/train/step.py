"""One optimizer step through megatron-core: forward and backward by its schedules, reduce, clip, update.

`Engine` owns the living model of this rank. The stage controller tells it what changes (RoPE base,
sequence length, precision); the trainer feeds it micro-batches. It knows nothing of stages or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_smol.data.loader import MicroBatch
from megatron_smol.errors import UserError
from megatron_smol.model.backend import backend, init_process_group, seed_random_streams
from megatron_smol.model.llama import build_model, set_rope_base
from megatron_smol.model.precision import precision as lookup_precision
from megatron_smol.recipe.schema import Recipe
from megatron_smol.train.optim import build_optimizer, ddp_config, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats per token over the global batch; grad_norm: global L2 norm before clipping."""

    loss: float
    grad_norm: float


def init_parallel(tp: int, pp: int) -> None:
    """Join the ranks and cut them into tensor-, pipeline- and data-parallel groups."""
    init_process_group()
    world = torch.distributed.get_world_size()
    if world % (tp * pp):
        raise UserError(
            f"{world} ranks cannot be divided into tp {tp} x pp {pp}; start a multiple of {tp * pp} ranks, "
            "or change parallel.tp or parallel.pp"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
        )


class Engine:
    """This rank's model, its gradient buffers and optimizer."""

    def __init__(self, recipe: Recipe, seq_length: int, rope_base: float, precision: str) -> None:
        init_parallel(recipe.parallel.tp, recipe.parallel.pp)
        seed_random_streams(recipe.seed)
        self.recipe = recipe
        self.seq_length, self.rope_base, self.precision = seq_length, rope_base, precision
        self._build()

    def _build(self) -> None:
        """(Re)build model and optimizer for the current precision, with the initial weights."""
        precision, parallel = lookup_precision(self.precision), self.recipe.parallel
        gpt = build_model(
            self.recipe.model, parallel, precision, self.seq_length, self.rope_base, self.recipe.seed
        )
        config = gpt.config
        module = Float16Module(config, gpt) if precision.bf16 else gpt
        overlap = backend().on_gpu and parallel_state.get_data_parallel_world_size() > 1
        self.model = DistributedDataParallel(config, ddp_config(overlap), module)
        self.optimizer = build_optimizer(self.model, self.recipe.optimizer, precision)
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self.model.no_sync
        config.grad_scale_func = self.optimizer.scale_loss
        if overlap:
            config.param_sync_func = self.model.start_param_sync
        self._forward_backward = get_forward_backward_func()

    @property
    def gpt(self) -> GPTModel:
        return unwrap_model(self.model)

    def configure(self, seq_length: int, rope_base: float) -> None:
        """Enter a stage of the same precision: positions and shapes change, weights and moments stay."""
        if rope_base != self.rope_base:
            set_rope_base(self.gpt, rope_base)
        self.seq_length, self.rope_base = seq_length, rope_base

    def rebuild(self, precision: str) -> None:
        """Change precision: a new model and optimizer, whose state the caller loads from a checkpoint."""
        del self.model, self.optimizer  # before the new ones, or both would be in memory
        self.precision = precision
        self._build()

    def train_step(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one AdamW update at `lr`."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_learning_rate(self.optimizer, lr)
        loss = self._run(batches, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(loss, float(grad_norm))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean nats per token over every data-parallel rank's micro-batches; changes nothing."""
        return self._run(batches, forward_only=True)

    def _run(self, batches: Sequence[MicroBatch], forward_only: bool) -> float:
        if not batches:  # a validation set smaller than the number of data-parallel ranks
            return _mean_over_ranks([])
        losses = self._forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.seq_length,
            micro_batch_size=batches[0].tokens.size(0),
            forward_only=forward_only,
        )
        return _mean_over_ranks(losses)


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    per_token = model(
        batch.tokens, None, batch.mask, labels=batch.labels
    )  # [b, s] on the last pipeline stage
    return per_token, _mean_loss


def _mean_loss(per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = per_token.float().mean()
    return loss, {"loss": loss.detach().clone()}  # megatron-core scales the loss in place


def _mean_over_ranks(losses: list[dict[str, Tensor]]) -> float:
    """Mean over micro-batches and data-parallel ranks, the same number on every rank.

    Only the last pipeline stage has losses; the tensor-parallel ranks of it hold equal copies.
    """
    total = torch.zeros(2, dtype=torch.float64, device=backend().device)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[0] = torch.stack([entry["loss"] for entry in losses]).double().sum()
        total[1] = len(losses)
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])
