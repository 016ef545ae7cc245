"""What test ranks do: take real steps, count their tensors, and estimate the same. Run by helpers.run_ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from megatron_smol.data.batch import MicroBatch
from megatron_smol.measure.memory import count_bytes
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.memory import Layout, rank_memory, rank_parameters
from megatron_smol.recipe.schema import Recipe
from megatron_smol.train.step import Engine

# layers, hidden, heads, key/value heads, feed-forward, vocabulary, length: three sizes of different proportions.
SHAPES = {
    "narrow": (4, 64, 4, 2, 160, 512, 64),
    "wide": (4, 256, 8, 8, 704, 2048, 128),
    "deep": (8, 128, 4, 4, 512, 1024, 256),
}


def recipe(shape: str, micro_batch: int, parallel: str, precision: str) -> Recipe:
    count = 4 if "pp" in parallel else 2  # micro-batches of a step, over two data-parallel ranks or one
    layers, hidden, heads, kv_heads, ffn, vocabulary, length = SHAPES[shape]
    return parse_recipe(
        f"""
name: memory
run_dir: nowhere
tokenizer: none
model: {{layers: {layers}, hidden_size: {hidden}, heads: {heads}, kv_heads: {kv_heads}, ffn_size: {ffn}, vocab_size: {vocabulary}}}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: {length}, global_batch: {count * micro_batch}, micro_batch: {micro_batch}, precision: {precision}}}
stages: [{{name: one, until: 10 steps, mixture: {{a: 1}}}}]
lr: {{peak: 1e-3}}
parallel: {{{parallel}}}
"""
    )


def _engine(made: Recipe) -> Engine:
    """On one thread: two of a forked process wait for each other while others have the cores."""
    engine = Engine(made, made.training.seq_length, 10000.0, made.training.precision)
    torch.set_num_threads(1)
    return engine


def batches(made: Recipe, engine: Engine) -> list[MicroBatch]:
    data = parallel_state.get_data_parallel_world_size()
    count = made.training.global_batch // (made.training.micro_batch * data)
    shape = (made.training.micro_batch, made.training.seq_length + 1)
    drawn = torch.randint(made.model.vocab_size, (count, *shape))
    return [MicroBatch.of(ids.numpy(), torch.device("cpu")) for ids in drawn]


def compare(
    jobs: list[tuple[str, int]], parallel: str, precision: str
) -> list[dict[str, tuple[float, float]]]:
    """(counted, estimated) bytes of this rank by name, for each (shape, micro-batch); and the number of parameters."""
    return [_compare(shape, micro_batch, parallel, precision) for shape, micro_batch in jobs]


def _compare(shape: str, micro_batch: int, parallel: str, precision: str) -> dict[str, tuple[float, float]]:
    made = recipe(shape, micro_batch, parallel, precision)
    settings = made.training
    engine = _engine(made)
    layout = Layout.of(made.parallel, torch.distributed.get_world_size())
    counted = count_bytes(engine, batches(made, engine))
    position = parallel_state.get_pipeline_model_parallel_rank()
    here = rank_memory(made.model, layout, settings, position, "cpu")
    parameters = sum(p.numel() for gpt in engine.gpts for p in gpt.parameters())
    return {
        "parameters": (parameters, rank_parameters(made.model, layout, position)),
        "weights": (counted.weights, here.weights),
        "gradients": (counted.gradients, here.gradients),
        "optimizer": (counted.optimizer, here.optimizer),
        "saved": (counted.saved, here.activations + softmax_bytes(made, layout, position)),
        "peak": (counted.peak, here.activations + here.logits + here.workspace),
    }


def softmax_bytes(made: Recipe, layout: Layout, position: int) -> float:
    """What the loss saves: an fp32 number for each entry of the vocabulary."""
    last = position == layout.pp - 1
    return 4.0 * layout.tokens(made.training) * made.model.vocab_size / layout.tp if last else 0.0


def counted_flops(shape: str, parallel: str) -> dict[str, int]:
    """torch's count over one micro-batch of two windows: forward only, and forward and backward."""
    made = recipe(shape, 2, parallel, "fp32")
    engine = _engine(made)
    (batch, *_) = batches(made, engine)
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as forward:
        engine.evaluate([batch])
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as both:
        engine.train_step([batch], 1e-3)
    return {"forward": forward.get_total_flops(), "all": both.get_total_flops()}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _product_flops(added_to: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return mm_flop(left, right)


# torch's counter knows the attention kernels of GPUs only; the CPU's take the same tensors. Weight gradients are
# added in place by their product.
_UNCOUNTED = {
    torch.ops.aten.addmm_: _product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
