"""How long until the first batch can be read: our plan and order against megatron-core's index builders.

Ours is the full 11 T tokens of examples/smollm2_1.7b.yaml, from the loaded recipe to the rows of a batch.
megatron-core's work grows with the samples, so it is timed at sizes that fit, for the mixture of the
recipe's first stage: per source the document, sample and shuffle index of a GPTDataset, then the blend. Not
counted for it: reading the .idx files, its check of the blend, writing the .npy caches. Seconds are of
processor time (both work on one core), because minutes on the wall of a shared machine are not.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.common import ROOT, Outcome, Spread, peak_memory_bytes, run, say

RECIPE = ROOT / "examples" / "smollm2_1.7b.yaml"
STAGE = "stable-1"
SIZES = (10**6, 10**7, 10**8)
LIMIT_SECONDS = 60  # a size that would take the peer longer is left out
BYTES_PER_SAMPLE = 100  # of the peer at its peak, for the check that a size fits in memory
MEAN_DOCUMENT_TOKENS = 1000  # about FineWeb-Edu's
BATCH, LOOKUPS = 1024, 300


def measure() -> Outcome:
    import psutil

    bare, ours = _bare_memory_bytes(), [_child("ours")]
    peers: list[dict[str, Any]] = []
    for size in SIZES:
        # Shuffles leave the caches as they grow: ten times the samples took twenty times as long.
        expected = 2 * peers[-1]["seconds"] * size / peers[-1]["samples"] if peers else 0
        if expected > LIMIT_SECONDS or psutil.virtual_memory().available < BYTES_PER_SAMPLE * size:
            say(f"{size:,} samples left out: too long or too large for here")
            break
        peers.append(_child("peer", size))
        ours += [_child("ours") for _ in range(2)]
        say(f"megatron-core, {size:,} samples: {peers[-1]['seconds']:.3g} s")
    ready = Spread(tuple(one["seconds"] for one in ours))
    memory = Spread(tuple((one["peak_memory_bytes"] - bare) / 1e6 for one in ours))
    largest, samples = peers[-1], ours[0]["samples"]
    whole = {
        "samples": samples,
        "seconds": largest["seconds"] * samples / largest["samples"],
        "index_gb": largest["index_bytes"] * samples / largest["samples"] / 1e9,
    }
    return Outcome(
        ratio=Spread(tuple(largest["seconds"] / seconds for seconds in ready.values)),
        ratio_of=f"seconds to the first batch: ours for all {samples:,} samples, peer for {largest['samples']:,}",
        peer_is="megatron-core's GPTDataset and blend index builders",
        ours=f"{ready.median * 1e3:.1f} ms, {memory.median:.0f} MB above numpy",
        peer=f"{largest['seconds']:.1f} s, {largest['index_bytes'] / 1e9:.2g} GB of index",
        details={
            "ours": {
                "seconds": ready.to_json(),
                "extra_memory_mb": memory.to_json(),
                **{key: Spread(tuple(one[key] for one in ours)).to_json() for key in _PARTS},
            },
            "peer": peers,
            "peer_extrapolated_to_the_whole_recipe": whole,
        },
        settings={
            "recipe": RECIPE.name,
            "stage_of_the_peer": STAGE,
            "mean_document_tokens": MEAN_DOCUMENT_TOKENS,
        },
        notes=[
            f"random access, {BATCH} rows at once: ours "
            f"{Spread(tuple(one['ns_per_row_in_batch'] for one in ours)).median:.0f} ns a row, computed; peer, from "
            + ", ".join(f"{one['ns_per_row_in_batch']:.0f} ns at {one['samples']:,}" for one in peers)
            + " samples, read from arrays in memory",
            f"extrapolated to the whole recipe the peer takes {whole['seconds'] / 60:.0f} min and "
            f"{whole['index_gb']:.0f} GB of index, without writing it",
        ],
    )


_PARTS = ("plan_seconds", "order_seconds", "us_single_row", "ns_per_row_in_batch")


def measure_ours() -> dict[str, Any]:
    """Run in a fresh process."""
    from megatron_smol.data.stream import StageStream
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes

    recipe = load_recipe(RECIPE)
    begin = time.process_time()
    plan = make_plan(recipe, resolve_sizes(recipe))
    planned = time.process_time()
    stage = plan.trunk[-1]  # the latest: nothing may depend on how far in the run it is
    stream = StageStream(stage, plan.orders)
    rows = stream.rows(stage.samples - stage.global_batch, stage.samples)
    ready = time.process_time()
    memory = peak_memory_bytes()
    assert len(rows) == stage.global_batch and "torch" not in sys.modules
    return {
        "seconds": ready - begin,
        "plan_seconds": planned - begin,
        "order_seconds": ready - planned,
        "peak_memory_bytes": memory,
        "samples": sum(stage.samples for stage in plan.stages),
        **_access(stream.rows, stage.samples),
    }


def measure_peer(samples: int) -> dict[str, Any]:
    """Run in a fresh process: the indices of one epoch of each source of the stage, then the blend."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    from megatron_smol.recipe.load import load_recipe

    recipe = load_recipe(RECIPE)
    stage = next(stage for stage in recipe.stages if stage.name == STAGE)
    weights = [float(weight) for weight in stage.mixture.values()]
    length = recipe.training_of(stage).seq_length
    parts = dict.fromkeys(("document_index", "sample_index", "shuffle_index", "blend"), 0.0)
    sources = []
    for weight in weights:
        # 0.5 % more than needed, as megatron-core's mid_level_dataset_surplus.
        lengths = _document_lengths(math.ceil(samples * weight * 1.005) * length + 1)
        random = np.random.RandomState(1234)
        tokens = int(lengths.sum(dtype=np.int64))
        documents = np.arange(len(lengths), dtype=np.int32)
        begin = time.process_time()
        order = _build_document_index(documents, 1, random, False)
        ordered = time.process_time()
        index = helpers.build_sample_idx(lengths, order, length, 1, tokens, True, True)
        indexed = time.process_time()
        shuffle = _build_shuffle_index(len(index) - 1, len(index) - 1, random)
        parts["shuffle_index"] += time.process_time() - indexed
        parts["document_index"] += ordered - begin
        parts["sample_index"] += indexed - ordered
        sources.append((order, index, shuffle))
        del lengths, documents
    begin = time.process_time()
    which, ordinal = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    helpers.build_blending_indices(which, ordinal, weights, len(weights), samples, False)
    parts["blend"] = time.process_time() - begin

    def rows(start: int, stop: int) -> list[Any]:
        found = []
        for number, (order, index, shuffle) in enumerate(sources):
            mine = shuffle[ordinal[start:stop][which[start:stop] == number]]
            found.append((order[index[mine, 0]], index[mine, 1]))  # first document, offset in it
        return found

    arrays = [array for source in sources for array in source]
    return {
        "samples": samples,
        "seconds": sum(parts.values()),
        "parts_seconds": parts,
        "index_bytes": sum(array.nbytes for array in [*arrays, which, ordinal]),
        "peak_memory_mb": peak_memory_bytes() / 1e6,
        **_access(rows, samples),
    }


def _document_lengths(tokens: int) -> np.ndarray:
    """Lengths of documents that hold `tokens` tokens together: log-normal, like the web."""
    drawn = np.random.default_rng(7).lognormal(0.0, 1.0, 1_000_000)
    tile = np.maximum(1, drawn * (MEAN_DOCUMENT_TOKENS / drawn.mean())).astype(np.int32)
    return np.resize(tile, math.ceil(tokens / tile.mean()) + 1)


def _access(rows: Callable[[int, int], Any], samples: int) -> dict[str, float]:
    """Median time of a lookup anywhere in the run: one row, and BATCH rows at once."""
    starts = np.random.default_rng(3).integers(0, samples - BATCH, LOOKUPS).tolist()

    def median(count: int) -> float:
        taken = []
        for start in starts:
            begin = time.perf_counter()  # process_time is too coarse here
            rows(start, start + count)
            taken.append(time.perf_counter() - begin)
        return float(np.median(taken))

    return {"us_single_row": median(1) * 1e6, "ns_per_row_in_batch": median(BATCH) / BATCH * 1e9}


def _bare_memory_bytes() -> int:
    """Peak memory of an interpreter that has imported numpy and nothing else."""
    code = "import numpy; print(*[l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')])"
    return int(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout) * 1024


def _child(which: str, *arguments: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.index", which, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            run("index", measure)
        case ["ours"]:
            print(json.dumps(measure_ours()))
        case ["peer", samples]:
            print(json.dumps(measure_peer(int(samples))))
