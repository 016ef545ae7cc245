"""Step 3: the same shape trained by others, in the same run: transformers eager and compiled, with Liger, and ours without Transformer Engine.

What is not installed is written down as such. All do the same work: causal attention, bf16 arithmetic over fp32 master weights, gradients clipped
to norm 1, AdamW.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from bench.gpu.common import Options, Row, options, quick_weights, run_rows

SHAPES = ((2048, 16384), (8192, 16384))  # length, tokens of a micro-batch


def main() -> None:
    given = options(__doc__, 330)
    quick_weights()
    rows: list[Row] = []
    for length, tokens in SHAPES:
        at = f"{length} x {tokens // length}"
        rows += [
            (f"ours {at}", partial(_ours, given, length, tokens, True)),
            (f"ours without Transformer Engine {at}", partial(_ours, given, length, tokens, False)),
            (f"transformers {at}", partial(_transformers, given, length, tokens)),
            (
                f"transformers, layers compiled {at}",
                partial(_transformers, given, length, tokens, compiled=True),
            ),
            (f"transformers + Liger {at}", partial(_transformers, given, length, tokens, liger=True)),
            (
                f"transformers + torchao float8, compiled {at}",
                partial(_transformers, given, length, tokens, compiled=True, float8=True),
            ),
        ]
    run_rows("peers", [row for row in rows if not given.rest or any(r in row[0] for r in given.rest)], given)


def _ours(given: Options, length: int, tokens: int, transformer_engine: bool) -> dict[str, Any]:
    from dataclasses import replace

    from megatron_smol.measure import train
    from megatron_smol.model import llama
    from megatron_smol.model.backend import backend

    here = backend()
    chosen = here if transformer_engine else replace(here, transformer_engine=False)
    modules = (llama, train)
    for module in modules:
        module.backend = lambda: chosen  # type: ignore[attr-defined]
    try:
        return train.measure(given.setting("bf16", length, tokens))
    finally:
        for module in modules:
            module.backend = backend  # type: ignore[attr-defined]


def _transformers(
    given: Options,
    length: int,
    tokens: int,
    compiled: bool = False,
    liger: bool = False,
    float8: bool = False,
) -> dict[str, Any]:
    import torch
    from transformers import LlamaForCausalLM

    setting = given.setting("bf16", length, tokens)
    shape, training = setting.recipe.model, setting.recipe.training
    device = torch.device("cpu" if given.dry_run else "cuda")
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    with torch.device(device):
        model = LlamaForCausalLM(_llama_config(shape, length)).train()
    if float8:
        from torchao.float8 import convert_to_float8_training

        layers = model.model.layers
        convert_to_float8_training(layers)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), 1e-8, 0.01, fused=True)
    ids = torch.randint(shape.vocab_size, (4, training.micro_batch, length + 1), device=device)

    def step(index: int) -> None:
        windows = ids[index % 4]
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            labels = windows[:, 1:].contiguous()
            loss = model(windows[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        float(loss)  # waits for the device

    return _timed(step, setting.warmup, setting.steps, training.micro_batch * length)


def _llama_config(shape: Any, length: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def _timed(step: Any, warmup: int, steps: int, tokens: int) -> dict[str, Any]:
    import torch

    for index in range(warmup):
        step(index)
    seconds = []
    for index in range(steps):
        begin = time.perf_counter()
        step(index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    rates = [tokens / s for s in seconds]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    spread = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
    return {"tokens_per_second_per_gpu": spread, "peak_bytes": peak}


if __name__ == "__main__":
    main()
