"""SmolLM2's shape as a megatron-core GPTModel: configuration, construction, initial weights, RoPE base.

Llama-style decoder (recipe: paper 2502.02737 section 4, huggingface/smollm configs): RMSNorm before each
block, rotary positions, grouped queries, SwiGLU, no biases, no dropout, tied embeddings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megatron_smol.model.attention import SdpaCoreAttention
from megatron_smol.model.backend import Backend, backend
from megatron_smol.model.emulated_fp8 import emulate
from megatron_smol.model.layers import RMSNorm, SwiGluMLP
from megatron_smol.model.precision import Precision, require_layers
from megatron_smol.recipe.schema import Model, Parallel


def transformer_config(model: Model, parallel: Parallel, precision: Precision) -> TransformerConfig:
    """megatron-core's configuration of this model; raises UserError where the precision cannot run here."""
    here = backend()
    precision.require(here)
    te = here.transformer_engine
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn_size,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        # Two ranks that are each other's both neighbours need one message at a time; megatron-core's batches mix them up.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        context_parallel_size=parallel.cp,
        # Transformer Engine's names for the two ways.
        cp_comm_type={"ring": "p2p", "all_gather": "all_gather"}[parallel.cp_comm]
        if parallel.cp > 1
        else None,
        **_RECOMPUTE[parallel.recompute],
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        params_dtype=precision.params_dtype,
        bf16=precision.bf16,
        pipeline_dtype=precision.params_dtype,
        # Weights are written by `initialize_weights`, alike on every layout.
        perform_initialization=False,
        use_cpu_initialization=not here.on_gpu,
        # On a GPU it needs NVIDIA Apex's extension; on the CPU `backend.use_cpu` has what stands in for it, in fp32.
        gradient_accumulation_fusion=not here.on_gpu and precision.params_dtype is torch.float32,
        bias_activation_fusion=here.on_gpu,
        apply_rope_fusion=te,
        cross_entropy_loss_fusion=te,
        cross_entropy_fusion_impl="te" if te else "native",
        deallocate_pipeline_outputs=here.on_gpu,  # gloo may still be sending them
        **(precision.fp8 or {}),
    )


# megatron-core's fields. `selective` leaves out what is large and cheap: the scores' part of attention.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def layer_spec(
    config: TransformerConfig, here: Backend, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers where they can run, else megatron-core's with our attention and norm."""
    if here.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    spec.submodules.mlp.module = SwiGluMLP
    layers = [spec] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def build_model(
    model: Model, parallel: Parallel, precision: Precision, seq_length: int, rope_base: float, seed: int
) -> list[GPTModel]:
    """This rank's parts of the model (one, or `parallel.vpp`), with initial weights that do not depend on the layout."""
    config = transformer_config(model, parallel, precision)
    vp_stages = range(parallel.vpp) if parallel.vpp > 1 else [None]
    parts = [_build_part(model, config, seq_length, rope_base, seed, vp_stage) for vp_stage in vp_stages]
    for gpt in parts:
        if precision.emulated:
            emulate(gpt, precision)
        if precision.fp8:
            _require_fp8(gpt, precision)
    return parts


def _require_fp8(gpt: GPTModel, precision: Precision) -> None:
    """The precision law, once the model is there: its layers look at FP8, and at the recipe that was asked for."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.common import recipe as recipes

    require_layers(gpt, precision.name)
    precision.require_recipe(get_fp8_recipe(gpt.config), recipes)


def _build_part(
    model: Model,
    config: TransformerConfig,
    seq_length: int,
    rope_base: float,
    seed: int,
    vp_stage: int | None,
) -> GPTModel:
    here = backend()
    gpt = GPTModel(
        config,
        layer_spec(config, here, vp_stage),
        vocab_size=model.vocab_size,
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=rope_base,
        vp_stage=vp_stage,
    )
    gpt.to(here.device)
    initialize_weights(gpt, model, seed)
    return gpt


def set_rope_base(gpt: GPTModel, rope_base: float) -> None:
    """Change the rotary base of a living model (context extension: 10,000 to 130,000, paper 4.6)."""
    rotary = gpt.rotary_pos_emb
    dim = gpt.config.kv_channels
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=rotary.inv_freq.device) / dim
    rotary.inv_freq = 1.0 / (rope_base**exponents)
    rotary.forward.cache_clear()  # it remembers the angles of each length


# --- initial weights ---------------------------------------------------------------------------------------


@torch.no_grad()
def initialize_weights(gpt: GPTModel, model: Model, seed: int) -> None:
    """Normal(0, init_std); outputs of attention and MLP scaled by 1/sqrt(2·layers); norms 1.

    The rule is nanotron's and Megatron's (huggingface/nanotron, parametrization.py, August 2024). Every tensor is drawn whole from a
    generator of its own, keyed by (seed, name), and then sliced, so TP, PP and DP cannot change it.
    """
    for name, parameter, kind in named_global_parameters(gpt):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        full_shape = list(parameter.shape)
        if kind is not None:
            # megatron-core marks its split weights only when it initialises them; the gradient norm needs the marks.
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            parameter.tensor_model_parallel, parameter.partition_dim = True, kind.dim  # type: ignore[attr-defined]
            full_shape[kind.dim] *= parallel_state.get_tensor_model_parallel_world_size()
        std = model.init_std / (math.sqrt(2 * model.layers) if kind and kind.output else 1.0)
        key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key))
        full = torch.empty(full_shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        parameter.copy_(tensor_parallel_slice(full, kind) if kind else full)


class Split:
    """How a weight is divided over tensor-parallel ranks: along `dim`, gate and up halves separately if `gated`."""

    def __init__(self, dim: int, gated: bool = False, output: bool = False) -> None:
        self.dim, self.gated, self.output = dim, gated, output


_SPLITS = {
    "word_embeddings.weight": Split(0),
    "output_layer.weight": Split(0),
    "linear_qkv.weight": Split(0),
    "linear_fc1.weight": Split(0, gated=True),
    "linear_proj.weight": Split(1, output=True),
    "linear_fc2.weight": Split(1, output=True),
}


def tensor_parallel_slice(full: Tensor, split: Split) -> Tensor:
    """This rank's part of a whole weight."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if split.gated:  # [gate; up], each divided: a rank holds [gate_r; up_r]
        return torch.cat([half.chunk(size, 0)[rank] for half in full.chunk(2, 0)])
    return full.chunk(size, split.dim)[rank]


def named_global_parameters(gpt: GPTModel) -> Iterator[tuple[str, Tensor, Split | None]]:
    """(name with the layer's number in the whole model, this rank's tensor, how it is split)."""
    for name, parameter in gpt.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(gpt.decoder.layers[int(parts[2])].layer_number - 1)
        global_name = ".".join(parts)
        if global_name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
            global_name = (
                "embedding.word_embeddings.weight"  # the last pipeline stage's copy of the tied table
            )
        yield global_name, parameter, _SPLITS.get(".".join(parts[-2:]))
