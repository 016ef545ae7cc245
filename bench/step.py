"""One training step on the CPU: ours on megatron-core against plain transformers with torch's AdamW.

Same shape, same initial weights, same batches, same threads, in turns; the peer does the same work: causal
SDPA attention, mean cross-entropy, gradients clipped to norm 1, AdamW on all parameters in one fused pass. The
losses of the two must agree, or the comparison means nothing.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import Outcome, Seconds, cpu_seconds, run, say, take_turns
from bench.shape import LENGTH, MICRO_BATCH, MICRO_BATCHES, ROPE_BASE, TOKENS_PER_STEP, build, describe
from megatron_smol.checkpoint.hf import Description, llama_config
from megatron_smol.checkpoint.weights import megatron_tensors, split_weight, weight_map
from megatron_smol.data.loader import MicroBatch
from megatron_smol.recipe.schema import Recipe
from megatron_smol.train.step import Engine

WARMUP, TURNS = 2, 14
LR = 5e-4
LOSS_TOLERANCE = 1e-3  # relative, after all steps: only the order of additions differs


def measure() -> Outcome:
    recipe, engine = build()
    batches = [_batch(recipe, step) for step in range(WARMUP + TURNS)]
    ours, peer = _Ours(engine, batches), _Peer(recipe, engine, batches)
    for _ in range(WARMUP):
        ours(), peer()
    say(f"{TURNS} turns of one step each, {torch.get_num_threads()} threads")
    turns = take_turns(ours, peer, TURNS, "wall")
    worst = max(abs(a - b) / b for a, b in zip(ours.losses, peer.losses, strict=True))
    if worst > LOSS_TOLERANCE:
        raise AssertionError(f"losses differ by {worst:.2g}: the two do not train the same model")
    our_rate, peer_rate = turns.rates(TOKENS_PER_STEP)
    size, by_cpu = recipe.model.parameters() / 1e6, dataclasses.replace(turns, clock="cpu").ratio
    return Outcome(
        ratio=turns.ratio,
        ratio_of=f"training tokens/s, {size:.0f}M parameters, length {LENGTH}, fp32, {torch.get_num_threads()} threads",
        peer_is="transformers' LlamaForCausalLM, torch's AdamW",
        ours=f"{our_rate.median:,.0f} tokens/s",
        peer=f"{peer_rate.median:,.0f} tokens/s",
        details={
            "ours_tokens_per_s": our_rate.to_json(),
            "peer_tokens_per_s": peer_rate.to_json(),
            "ratio_of_cpu_seconds": by_cpu.to_json(),
            **turns.to_json(),
            "losses": {"ours": ours.losses, "peer": peer.losses, "largest_relative_difference": worst},
        },
        settings={**describe(recipe), "warmup_steps": WARMUP},
        notes=[
            f"by processor time the ratio is {by_cpu.median:.3f} ({min(by_cpu.values):.3f} to "
            f"{max(by_cpu.values):.3f}); losses agree to {worst:.0e} over {len(batches)} steps"
        ],
    )


def _batch(recipe: Recipe, step: int) -> list[MicroBatch]:
    """Random ids; the same for both."""
    generator = torch.Generator().manual_seed(step)
    shape = (MICRO_BATCH, LENGTH + 1)
    drawn = [torch.randint(recipe.model.vocab_size, shape, generator=generator) for _ in range(MICRO_BATCHES)]
    return [MicroBatch.of(ids.numpy(), torch.device("cpu")) for ids in drawn]


class _Steps:
    """Takes the next batch at each call, and keeps the losses."""

    def __init__(self, batches: list[list[MicroBatch]]) -> None:
        self._batches = iter(batches)
        self.losses: list[float] = []

    def __call__(self) -> Seconds:
        batch = next(self._batches)
        wall, cpu = time.perf_counter(), cpu_seconds()
        self.losses.append(self.step(batch))
        return Seconds(time.perf_counter() - wall, cpu_seconds() - cpu)

    def step(self, batch: list[MicroBatch]) -> float:
        raise NotImplementedError


class _Ours(_Steps):
    def __init__(self, engine: Engine, batches: list[list[MicroBatch]]) -> None:
        super().__init__(batches)
        self._engine = engine

    def step(self, batch: list[MicroBatch]) -> float:
        return self._engine.train_step(batch, LR).loss


class _Peer(_Steps):
    def __init__(self, recipe: Recipe, engine: Engine, batches: list[list[MicroBatch]]) -> None:
        super().__init__(batches)
        described = Description(recipe.model, ROPE_BASE, LENGTH, {})
        config = LlamaConfig(**llama_config(described, torch.float32) | {"attn_implementation": "sdpa"})
        self._model = LlamaForCausalLM(config).train()
        self._model.load_state_dict(_hf_weights(recipe, engine), strict=False)
        given = recipe.optimizer
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            LR,
            (given.beta1, given.beta2),
            given.eps,
            given.weight_decay,
            fused=True,
        )
        self._clip = given.clip

    def step(self, batch: list[MicroBatch]) -> float:
        self._optimizer.zero_grad()
        total = 0.0
        for micro in batch:
            # shift_labels: ours are shifted already.
            out = self._model(micro.tokens, labels=micro.labels, shift_labels=micro.labels, use_cache=False)
            loss = out.loss / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        return total


def _hf_weights(recipe: Recipe, engine: Engine) -> dict[str, Tensor]:
    tensors = megatron_tensors(dict(engine.gpt.named_parameters()))
    return {
        name: part.clone()
        for weight in weight_map(recipe.model)
        for name, part in split_weight(weight, tensors[weight.megatron], recipe.model).items()
    }


if __name__ == "__main__":
    run("step", measure)
