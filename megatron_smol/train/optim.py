"""megatron-core's AdamW with its states sharded over data-parallel ranks.

SmolLM2 decayed all parameters, norms and embeddings included (nanotron of 2024 had no exclusion); Megatron's habit of sparing
1-D parameters is the option `decay_norms: false`. The distributed optimizer is used on every layout, one rank
included, unless the recipe says no: its checkpoint format is the one that reshards to any other.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from megatron_smol.model.precision import Precision
from megatron_smol.recipe.schema import Optimizer


def ddp_config(overlap: bool, distributed: bool, gather_fp8: bool = False) -> DistributedDataParallelConfig:
    """fp32 gradient accumulation and reduction (huggingface/smollm, the pretraining YAMLs); overlap hides NCCL behind the backward pass."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
        fp8_param_gather=gather_fp8,
    )


def build_optimizer(
    model: list[DistributedDataParallel], recipe: Optimizer, precision: Precision
) -> MegatronOptimizer:
    """AdamW over the gradient buffers of this rank's parts of the model; the learning rate is set anew each step (`set_learning_rate`)."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        clip_grad=recipe.clip,
        bf16=precision.bf16,
        params_dtype=precision.params_dtype,
        use_distributed_optimizer=model[0].ddp_config.use_distributed_optimizer,
        fp8_recipe=precision.fp8["fp8_recipe"] if precision.fp8 else None,
    )
    spared = {} if recipe.decay_norms else {_NORMS: {"wd_mult": 0.0}}
    optimizer = get_megatron_optimizer(config, model, config_overrides=spared)
    for group in optimizer.param_groups:
        group["weight_decay"] = recipe.weight_decay * group["wd_mult"]
    _allocate_moments(optimizer)
    return optimizer


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Give AdamW its state before the first step, so that a fresh optimizer can be saved, or loaded into."""
    for inner in (chained.optimizer for chained in optimizer.chained_optimizers):
        if not isinstance(inner, torch.optim.AdamW):  # Transformer Engine's FusedAdam does this by itself
            continue
        for group in inner.param_groups:
            group["fused"] = (
                True  # one pass over memory instead of eight; megatron-core has no setting for it
            )
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what megatron-core read from a checkpoint.

    megatron-core hands torch's AdamW one `step` tensor for all parameters; incremented in place it would
    count every parameter as a step, so each gets its own copy.
    """
    optimizer.load_state_dict(state)
    for inner in (chained.optimizer for chained in optimizer.chained_optimizers):
        for parameter_state in inner.state.values():
            if isinstance(parameter_state.get("step"), torch.Tensor):
                parameter_state["step"] = parameter_state["step"].clone()


def clip_gradients(optimizer: MegatronOptimizer, limit: float, grad_norm: float) -> None:
    """Bring the gradients' norm down to `limit`: in the optimizer's own pass over them where it can, else in one before."""
    parameters = optimizer.get_parameters()
    if parameters and isinstance(optimizer.optimizer, torch.optim.AdamW):
        excess = max(1.0, (grad_norm + 1e-6) / limit)
        # torch's fused AdamW divides by it as it reads the gradients
        optimizer.optimizer.grad_scale = torch.tensor(excess, device=parameters[0].device)  # type: ignore[attr-defined]
    elif parameters:
        clip_grad_by_total_norm_fp32(parameters, limit, grad_norm)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _set_states_with_step(self: DistributedOptimizer, model_param: Any, tensors: dict[str, Any]) -> None:
    """megatron-core 0.16.1 forgets that torch's AdamW also holds `step` (restored with the param groups)."""
    own = self._get_main_param_and_optimizer_states(model_param)
    _set_states(self, model_param, {"step": own["step"], **tensors} if "step" in own else tensors)


DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_with_step

_NORMS = ParamKey(predicate=ParamPredicate("one_dimensional", lambda parameter: parameter.dim() == 1))
