"""What test ranks do: build a small engine, train it on fixed batches, save, load. Run by helpers.run_ranks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_smol.checkpoint import folder, store
from megatron_smol.data.loader import MicroBatch
from megatron_smol.model.llama import named_global_parameters
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.schema import Recipe
from megatron_smol.train.step import Engine

GLOBAL_BATCH, MICRO_BATCH, LENGTH, VOCABULARY = 8, 2, 32, 256


def recipe(tp: int = 1, pp: int = 1, sequence_parallel: bool = False, tied: bool = True) -> Recipe:
    return parse_recipe(
        f"""
name: ranks
run_dir: nowhere
tokenizer: none
model: {{layers: 4, hidden_size: 64, heads: 4, kv_heads: 2, ffn_size: 96, vocab_size: {VOCABULARY}, tied_embeddings: {str(tied).lower()}}}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: {LENGTH}, global_batch: {GLOBAL_BATCH}, micro_batch: {MICRO_BATCH}, precision: fp32}}
stages: [{{name: one, until: 100 steps, mixture: {{a: 1}}}}]
lr: {{peak: 1e-3}}
parallel: {{tp: {tp}, pp: {pp}, sequence_parallel: {str(sequence_parallel).lower()}}}
"""
    )


def engine(
    tp: int, pp: int, sequence_parallel: bool = False, precision: str = "fp32", tied: bool = True
) -> Engine:
    torch.set_num_threads(1)
    return Engine(recipe(tp, pp, sequence_parallel, tied), LENGTH, 10000.0, precision)


def batches(step: int) -> list[MicroBatch]:
    """This rank's share of a global batch that depends on the step alone; next ids follow a rule to be learnt."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 1), generator=generator)
    noise = torch.randint(0, 3, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    ids = (first + noise.cumsum(1)) % VOCABULARY
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    shares = [ids[i : i + MICRO_BATCH] for i in range(rank * MICRO_BATCH, GLOBAL_BATCH, MICRO_BATCH * size)]
    return [MicroBatch(share[:, :-1].contiguous(), share[:, 1:].contiguous()) for share in shares]


def train(running: Engine, first: int, last: int) -> list[tuple[float, float]]:
    results = [running.train_step(batches(step), 3e-3) for step in range(first, last)]
    return [(result.loss, result.grad_norm) for result in results]


def curve(
    tp: int, pp: int, sequence_parallel: bool, steps: int, precision: str = "fp32", tied: bool = True
) -> Any:
    """(loss, gradient norm) of each step, the RoPE base changed half-way as a stage would."""
    running = engine(tp, pp, sequence_parallel, precision, tied)
    first = train(running, 0, steps // 2)
    running.configure(LENGTH, 130000.0)
    return first + train(running, steps // 2, steps)


def initial_weights(tp: int, pp: int) -> dict[str, tuple[list[int], str]]:
    """Hash of every weight of this rank's part, put together over tensor-parallel ranks."""
    found = {}
    for name, parameter, split in named_global_parameters(engine(tp, pp).gpt):
        whole = parameter.detach()
        if split is not None and tp > 1:
            parts = [torch.empty_like(whole) for _ in range(tp)]
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_gather(parts, whole.contiguous(), group=group)
            whole = torch.cat(parts, split.dim)
            if split.gated:  # [gate_0; up_0; gate_1; up_1] -> [gate; up]
                halves = [half for part in parts for half in part.chunk(2, 0)]
                whole = torch.cat(halves[0::2] + halves[1::2])
        found[name] = (list(whole.shape), digest(whole))
    return found


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def save_and_go_on(path: str, tp: int, pp: int) -> Any:
    """Train 3 steps, save, train 3 more: the curve after the save."""
    running = engine(tp, pp)
    train(running, 0, 3)
    state = {"stage": "one", "stage_index": 0, "step": 3}
    store.save(running, Path(path), state, parameters=10_000)
    return train(running, 3, 6)


def load_and_go_on(path: str, tp: int, pp: int, precision: str = "fp32") -> Any:
    running = engine(tp, pp, precision=precision)
    store.load(running, folder.read_checkpoint(Path(path)))
    return train(running, 3, 6)


def save_fails(path: str) -> tuple[str, list[str]]:
    """Save where rank 0 cannot write: what is raised on this rank, and what is left on disk."""
    from megatron_smol.errors import CheckpointError

    running = engine(1, 1)
    if torch.distributed.get_rank() == 0:
        store._InProcessWriter._write = _no_space  # type: ignore[method-assign]
    try:
        store.save(running, Path(path), {"stage": "one", "stage_index": 0, "step": 3}, parameters=10_000)
    except CheckpointError as error:
        torch.distributed.barrier()  # rank 0 clears up
        return str(error), sorted(p.name for p in Path(path).parent.iterdir())
    return "", []


def _no_space(self: Any, rank: int, buckets: Any, results: Any) -> None:
    results.put(OSError(28, "No space left on device"))
