"""Samples a second on one core: our StageLoader against megatron-core's BlendedDataset of GPTDatasets.

Both read the same four .bin/.idx pairs (random ids, documents of web-like lengths, in the page cache) in the
same mixture and give micro-batches of token and label tensors; the peer also makes the loss mask and position
ids of each sample, as it always does. Its indices are built before the clock starts. The peer goes through
torch's DataLoader without worker processes, ours through the loader's own batches without its read-ahead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from bench.common import Outcome, Seconds, Turns, run, say, take_turns, timed
from megatron_smol.data.indexed import IndexedWriter
from megatron_smol.data.loader import Share, StageLoader
from megatron_smol.data.source import TokenSource, load_source
from megatron_smol.model.backend import init_process_group
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.plan import Plan, make_plan

MIXTURE = {"web": 0.58, "code": 0.24, "math": 0.14, "books": 0.04}
TOKENS_PER_SOURCE, VOCABULARY, MEAN_DOCUMENT_TOKENS = 8_000_000, 49_152, 1000
LENGTHS = {256: 8192, 2048: 2048, 8192: 512}  # sequence length: samples a turn
HEADLINE, MICRO_BATCH, GLOBAL_BATCH, TURNS = 2048, 4, 64, 6


def measure() -> Outcome:
    torch.set_num_threads(1)
    init_process_group()  # BlendedDataset asks for its rank
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        for name in MIXTURE:
            _write_source(folder / name)
        sources = {name: load_source(folder / name) for name in MIXTURE}
        plan = _plan(folder, {name: source.tokens for name, source in sources.items()})
        turns = {length: _measure_length(length, plan, sources, folder) for length in LENGTHS}
    rates = {length: turns[length].rates(samples) for length, samples in LENGTHS.items()}
    ours, peer = rates[HEADLINE]
    others = [f"{turns[length].ratio.median:.2f} at {length}" for length in LENGTHS if length != HEADLINE]
    return Outcome(
        ratio=turns[HEADLINE].ratio,
        ratio_of=f"samples/s of one core at length {HEADLINE}",
        peer_is="megatron-core's BlendedDataset through a DataLoader",
        ours=f"{ours.median:,.0f} samples/s",
        peer=f"{peer.median:,.0f} samples/s",
        details={
            f"length_{length}": {
                "ratio": turns[length].ratio.to_json(),
                "ours_samples_per_s": rates[length][0].to_json(),
                "peer_samples_per_s": rates[length][1].to_json(),
                **turns[length].to_json(),
            }
            for length in LENGTHS
        },
        settings={
            "mixture": MIXTURE,
            "tokens_per_source": TOKENS_PER_SOURCE,
            "mean_document_tokens": MEAN_DOCUMENT_TOKENS,
            "micro_batch": MICRO_BATCH,
            "global_batch": GLOBAL_BATCH,
            "samples_a_turn": LENGTHS,
        },
        notes=[f"other lengths: ratio {' and '.join(others)}"],
    )


def _measure_length(length: int, plan: Plan, sources: dict[str, TokenSource], folder: Path) -> Turns:
    samples, stage = LENGTHS[length], plan.stage(f"length-{length}")
    loader = StageLoader(stage, plan.orders, sources, Share(0, 1), torch.device("cpu"))
    blended = _peer(length, samples, folder)
    steps = samples // GLOBAL_BATCH

    def ours() -> Seconds:
        return timed(
            lambda: _consume(batch for step in range(steps) for batch in _micro_batches(loader, step))
        )

    def peer() -> Seconds:
        batches = DataLoader(blended, batch_size=MICRO_BATCH, num_workers=0)
        return timed(lambda: _consume((batch["tokens"], batch["labels"]) for batch in batches))

    ours(), peer()  # brings the files into the page cache
    say(f"length {length}: {TURNS} turns of {samples} samples")
    return take_turns(ours, peer, TURNS, "cpu")


def _micro_batches(loader: StageLoader, steps_done: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in loader.batch(loader.stage.start_step + steps_done).micro_batches:
        yield batch.tokens, batch.labels


def _consume(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tokens, labels in batches:
        assert tokens.shape == labels.shape and tokens.size(0) == MICRO_BATCH


def _write_source(prefix: Path) -> None:
    random = np.random.default_rng(len(prefix.name))
    drawn = random.lognormal(0.0, 1.0, 2 * TOKENS_PER_SOURCE // MEAN_DOCUMENT_TOKENS)
    lengths = np.maximum(1, drawn * (MEAN_DOCUMENT_TOKENS / drawn.mean())).astype(np.int64)
    lengths = lengths[np.cumsum(lengths) < TOKENS_PER_SOURCE]
    ids = random.integers(0, VOCABULARY, lengths.sum(), dtype=np.uint16)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(ids, lengths, np.ones(len(lengths), np.int64))
        writer.finalize()


def _plan(folder: Path, sizes: dict[str, int]) -> Plan:
    """A stage for each length, that reads the mixture."""
    stages = [
        {
            "name": f"length-{length}",
            "tokens": f"{samples // GLOBAL_BATCH} steps",
            "seq_length": length,
            "mixture": MIXTURE,
        }
        for length, samples in LENGTHS.items()
    ]
    recipe = f"""
name: bench
run_dir: nowhere
tokenizer: none
model: {{layers: 1, hidden_size: 8, heads: 1, kv_heads: 1, ffn_size: 8}}
sources: {{{", ".join(f"{name}: {{path: '{folder / name}'}}" for name in MIXTURE)}}}
training: {{seq_length: 2048, global_batch: {GLOBAL_BATCH}, micro_batch: {MICRO_BATCH}, precision: fp32}}
stages: {stages}
lr: {{peak: 1e-3}}
"""
    return make_plan(parse_recipe(recipe), sizes)


def _peer(length: int, samples: int, folder: Path) -> BlendedDataset:
    tokenizer: Any = SimpleNamespace(vocab_size=VOCABULARY, eod=0, pad=-1, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=8,
        sequence_length=length,
        blend=([str(folder / name) for name in MIXTURE], list(MIXTURE.values())),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # as with fused attention: the mask would cost length^2
    )
    datasets = []
    for name, weight in MIXTURE.items():
        indexed = GPTDataset.build_low_level_dataset(str(folder / name), config)
        documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
        wanted = int(samples * weight * 1.01) + 2
        datasets.append(GPTDataset(indexed, str(folder / name), documents, wanted, Split.train, config))
    return BlendedDataset(datasets, list(MIXTURE.values()), samples, config)


if __name__ == "__main__":
    run("loader", measure)
