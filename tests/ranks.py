"""What test ranks do: build a small engine, train it on fixed batches, save, load. Run by helpers.run_ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch.distributed import checkpoint as dcp

from megatron_smol.checkpoint import folder, saving, store
from megatron_smol.checkpoint.own_part import reading_own_part
from megatron_smol.data.batch import Documents, MicroBatch
from megatron_smol.model.llama import named_global_parameters
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.schema import Recipe
from megatron_smol.train.step import Engine
from tests.layouts import Layout

GLOBAL_BATCH, LENGTH, VOCABULARY, EOD = 8, 32, 256, 7


def recipe(layout: Layout) -> Recipe:
    return parse_recipe(
        f"""
name: ranks
run_dir: nowhere
tokenizer: none
model: {{layers: 8, hidden_size: 32, heads: 4, kv_heads: 2, ffn_size: 48, vocab_size: {VOCABULARY}, tied_embeddings: {str(layout.tied).lower()}}}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: {LENGTH}, global_batch: {GLOBAL_BATCH}, micro_batch: {layout.micro_batch}, precision: fp32}}
stages: [{{name: one, until: 100 steps, mixture: {{a: 1}}}}]
lr: {{peak: 1e-3}}
parallel: {json.dumps(layout.parallel)}
"""
    )


def engine(layout: Layout, precision: str = "fp32") -> Engine:
    torch.set_num_threads(1)
    return Engine(recipe(layout), LENGTH, 10000.0, precision)


def windows(step: int, layout: Layout) -> torch.Tensor:
    """[batch, length + 1] ids that depend on the step alone; they follow a rule to be learnt."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 1), generator=generator)
    noise = torch.randint(0, 3, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    ids = (first + noise.cumsum(1)) % VOCABULARY
    if layout.document_mask:
        ids[:, 9], ids[::2, 20] = EOD, EOD
    return ids


def batches(step: int, layout: Layout) -> list[MicroBatch]:
    """This rank's share of the global batch."""
    ids, per_rank = windows(step, layout), layout.micro_batch
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    shares = [ids[i : i + per_rank] for i in range(rank * per_rank, GLOBAL_BATCH, per_rank * size)]
    return [_micro_batch(share, layout.document_mask) for share in shares]


def validate(running: Engine, layout: Layout) -> float:
    """Loss of three windows, which no layout can share evenly."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = [window[None] for window in windows(99, layout)[:3][rank::size]]
    return running.evaluate([_micro_batch(window, layout.document_mask) for window in mine])


def _micro_batch(ids: torch.Tensor, document_mask: bool) -> MicroBatch:
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return MicroBatch(tokens, labels, Documents.of(tokens.numpy(), EOD) if document_mask else None)


def train(running: Engine, layout: Layout, first: int, last: int) -> list[tuple[float, float]]:
    results = [running.train_step(batches(step, layout), 3e-3) for step in range(first, last)]
    return [(result.loss, result.grad_norm) for result in results]


def curve(layout: Layout, steps: int, precision: str = "fp32") -> tuple[dict[str, str], Any]:
    """(initial weights, (loss, gradient norm) of each step), the RoPE base changed half-way as a stage would.

    The last entry is a validation: (loss, 1).
    """
    running = engine(layout, precision)
    weights = initial_weights(running, layout.parallel.get("tp", 1))
    first = train(running, layout, 0, steps // 2)
    running.configure(LENGTH, 130000.0)
    second = train(running, layout, steps // 2, steps)
    return weights, [*first, *second, (validate(running, layout), 1.0)]


def initial_weights(running: Engine, tp: int) -> dict[str, str]:
    """Shape and hash of every weight of this rank's part, put together over tensor-parallel ranks."""
    found = {}
    for name, parameter, split in (named for gpt in running.gpts for named in named_global_parameters(gpt)):
        whole = parameter.detach()
        if split is not None and tp > 1:
            parts = [torch.empty_like(whole) for _ in range(tp)]
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_gather(parts, whole.contiguous(), group=group)
            whole = torch.cat(parts, split.dim)
            if split.gated:  # [gate_0; up_0; gate_1; up_1] -> [gate; up]
                halves = [half for part in parts for half in part.chunk(2, 0)]
                whole = torch.cat(halves[0::2] + halves[1::2])
        found[name] = f"{list(whole.shape)} {digest(whole)}"
    return found


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(
        tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def save_and_go_on(path: str, layout: Layout, last: int = 6) -> Any:
    """Train 3 steps, save, train on to `last`: the curve after the save."""
    running = engine(layout)
    train(running, layout, 0, 3)
    save(running, path)
    return train(running, layout, 3, last)


def load_and_go_on(
    path: str, layout: Layout, again: str | None = None, precision: str = "fp32", last: int = 6
) -> Any:
    """Load, save what was loaded to `again`, train to step `last`: the curve."""
    running = engine(layout, precision)
    store.load(running, folder.read_checkpoint(Path(path)))
    if again is not None:
        save(running, again)
    return train(running, layout, 3, last)


def save(running: Engine, path: str) -> None:
    state = {"stage": "one", "stage_index": 0, "step": 3}
    store.save(running, Path(path), state, size_bytes=160_000)


def stored_tensors(path: Path) -> dict[str, str]:
    """Shape and hash of every whole tensor in a checkpoint: weights, master weights and moments."""
    return {
        name: f"{list(tensor.shape)} {digest(tensor)}" for name, tensor in stored_tensors_whole(path).items()
    }


def stored_tensors_whole(path: Path) -> dict[str, torch.Tensor]:
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return tensors


def save_fails(path: str) -> tuple[str, list[str]]:
    """Save where rank 0 cannot write: what is raised on this rank, and what is left on disk."""
    from megatron_smol.errors import CheckpointError

    running = engine(Layout(2))
    if torch.distributed.get_rank() == 0:
        saving._Writer.write = _no_space  # type: ignore[method-assign]
    try:
        store.save(running, Path(path), {"stage": "one", "stage_index": 0, "step": 3}, size_bytes=160_000)
    except CheckpointError as error:
        torch.distributed.barrier()  # rank 0 clears up
        return str(error), sorted(p.name for p in Path(path).parent.iterdir())
    return "", []


def _no_space(self: Any) -> Any:
    raise OSError(28, "No space left on device")


def what_is_read(layout: Layout) -> tuple[int, int, int]:
    """Bytes of optimizer states that this rank reads of a checkpoint, that all read, and that there are."""
    running = engine(layout)
    described = [store._sharded_state(running, is_loading=True)]
    with reading_own_part(running.optimizer):
        described.append(store._sharded_state(running, is_loading=True))
    whole, mine = (
        sum(one.data.nbytes for one in nested_values(state["optimizer"]["param_state"]))
        for state in described
    )
    everyones = [0] * layout.ranks
    torch.distributed.all_gather_object(everyones, mine)
    return mine, sum(everyones), whole
