"""How long until the first batch can be read: our plan and order against megatron-core's index builders.

Ours is the full 11 T tokens of examples/smollm2_1.7b.yaml over 2,400 shards, from the loaded recipe to the rows
of a batch: manifests are read, the plan is made, and the last batch of the run is looked up. Opening the sources
for reading is timed as well. The shards have the sizes of real ones, but are holes in the disk. megatron-core's work grows with the samples, so it is timed at sizes that fit, for the mixture of the
recipe's first stage: per source the document, sample and shuffle index of a GPTDataset, then the blend. Not
counted for it: reading the .idx files, its check of the blend, writing the .npy caches. Seconds are of
processor time (both work on one core), because minutes on the wall of a shared machine are not.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.common import ROOT, Outcome, Spread, peak_memory_bytes, run, say

if TYPE_CHECKING:
    from megatron_smol.data.manifest import ShardRecord

RECIPE = ROOT / "examples" / "smollm2_1.7b.yaml"
STAGE = "stable-1"
SHARDS = 2400  # of all sources together
SIZES = (10**6, 10**7, 10**8)
LIMIT_SECONDS = 180  # a size that would take the peer longer is left out
BYTES_PER_SAMPLE = 100  # of the peer at its peak, for the check that a size fits in memory
MEAN_DOCUMENT_TOKENS = 1000  # about FineWeb-Edu's
BATCH, LOOKUPS = 1024, 300


def measure() -> Outcome:
    with TemporaryDirectory() as folder:
        say(f"writing {SHARDS:,} shards of holes")
        _write_sources(Path(folder))
        return _measure(lambda: _child("ours", folder))


def _measure(measure_ours: Callable[[], dict[str, Any]]) -> Outcome:
    import psutil

    bare, ours = _bare_memory_bytes(), [measure_ours()]
    peers: list[dict[str, Any]] = []
    for size in SIZES:
        # Shuffles leave the caches as they grow: ten times the samples took twenty times as long.
        expected = 2 * peers[-1]["seconds"] * size / peers[-1]["samples"] if peers else 0
        if expected > LIMIT_SECONDS or psutil.virtual_memory().available < BYTES_PER_SAMPLE * size:
            say(f"{size:,} samples left out: too long or too large for here")
            break
        peers.append(_child("peer", size))
        ours += [measure_ours() for _ in range(2)]
        say(f"megatron-core, {size:,} samples: {peers[-1]['seconds']:.3g} s")
    ready = Spread(tuple(one["seconds"] for one in ours))
    memory = Spread(tuple((one["peak_memory_bytes"] - bare) / 1e6 for one in ours))
    opened = Spread(tuple(one["open_sources_seconds"] for one in ours))
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
            "shards": SHARDS,
        },
        notes=[
            f"opening all {SHARDS:,} shards for reading, sizes checked: {opened.median * 1e3:.0f} ms more",
            f"random access: ours {Spread(tuple(one['us_single_row'] for one in ours)).median:.1f} us for one row, "
            f"{Spread(tuple(one['ns_per_row_in_batch'] for one in ours)).median:.0f} ns a row for {BATCH} at once, "
            "computed; peer, a row of as many, from "
            + ", ".join(f"{one['ns_per_row_in_batch']:.0f} ns at {one['samples']:,}" for one in peers)
            + " samples, read from arrays in memory",
            f"extrapolated to the whole recipe the peer takes {whole['seconds'] / 60:.0f} min and "
            f"{whole['index_gb']:.0f} GB of index, without writing it",
        ],
    )


_PARTS = (
    "wall_seconds",
    "manifests_seconds",
    "plan_seconds",
    "order_seconds",
    "open_sources_seconds",
    "us_single_row",
    "ns_per_row_in_batch",
)


def measure_ours(folder: Path) -> dict[str, Any]:
    """Run in a fresh process, on the sources in `folder`."""
    from megatron_smol.data.stream import StageStream
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.plan import make_plan, resolve_sizes

    names = load_recipe(RECIPE).sources
    recipe = load_recipe(RECIPE, [f"sources.{name}.path={folder / name}" for name in names])
    on_the_wall, begin = time.perf_counter(), time.process_time()
    sizes = resolve_sizes(recipe)
    read = time.process_time()
    plan = make_plan(recipe, sizes)
    planned = time.process_time()
    stage = plan.trunk[-1]  # the latest: nothing may depend on how far in the run it is
    stream = StageStream(stage, plan.orders)
    rows = stream.rows(stage.samples - stage.global_batch, stage.samples)
    ready, wall = time.process_time(), time.perf_counter() - on_the_wall
    memory = peak_memory_bytes()
    assert len(rows) == stage.global_batch and "torch" not in sys.modules

    from megatron_smol.data.source import load_source

    begin_open = time.process_time()
    opened = [load_source(source.path) for source in recipe.sources.values()]
    return {
        "seconds": ready - begin,
        "wall_seconds": wall,
        "manifests_seconds": read - begin,
        "plan_seconds": planned - read,
        "order_seconds": ready - planned,
        "open_sources_seconds": time.process_time() - begin_open,
        "shards": sum(len(source.shards) for source in opened),
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


def _write_sources(folder: Path) -> None:
    """The sources of the recipe, of their sizes, as manifests and files without content."""
    from megatron_smol.data.manifest import Manifest, TokenizerRecord
    from megatron_smol.recipe.load import load_recipe

    sources = load_recipe(RECIPE).sources
    tokens = {name: source.tokens or 0 for name, source in sources.items()}
    for name, size in tokens.items():
        shards = max(1, round(SHARDS * size / sum(tokens.values())))
        if name == max(tokens, key=lambda other: tokens[other]):  # makes the sum what it is said to be
            shards += SHARDS - sum(max(1, round(SHARDS * n / sum(tokens.values()))) for n in tokens.values())
        (folder / name).mkdir()
        records = [
            _write_shard(folder / name / f"shard-{i:05d}", size // shards + (i < size % shards))
            for i in range(shards)
        ]
        tokenizer = TokenizerRecord(name="holes", sha256="0" * 64, vocab_size=49152, eod_id=0)
        Manifest(
            source=name,
            tokenizer=tokenizer,
            dtype="uint16",
            tokens=size,
            documents=sum(record.documents for record in records),
            append_eod=True,
            json_key="text",
            sentences=None,
            keep_newlines=False,
            seed=8,
            empty_documents=0,
            bad_lines=0,
            dropped_characters=0,
            shards=tuple(records),
            inputs=(),
            versions={},
        ).write(folder / name / "manifest.json")


def _write_shard(prefix: Path, tokens: int) -> ShardRecord:
    """A .bin and an .idx as long as real ones, and right where opening them looks."""
    from megatron_smol.data.indexed import _HEADER, _MAGIC
    from megatron_smol.data.manifest import ShardRecord

    documents = tokens // MEAN_DOCUMENT_TOKENS
    bin_bytes, idx_bytes = 2 * tokens, _HEADER.size + 12 * documents + 8 * (documents + 1)
    last = tokens - (documents - 1) * MEAN_DOCUMENT_TOKENS
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(bin_bytes)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, 8, documents, documents + 1))
        for place, kind, entry in (
            (4 * (documents - 1), "<i", last),
            (4 * documents + 8 * (documents - 1), "<q", 2 * (tokens - last)),
            (12 * documents + 8 * documents, "<q", documents),
        ):
            file.seek(_HEADER.size + place)
            file.write(struct.pack(kind, entry))
    return ShardRecord(
        prefix=prefix.name,
        tokens=tokens,
        documents=documents,
        sequences=documents,
        bin_bytes=bin_bytes,
        idx_bytes=idx_bytes,
        bin_sha256=hashlib.sha256(str(prefix).encode()).hexdigest(),
        idx_sha256=hashlib.sha256(str(prefix).encode()).hexdigest(),
    )


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


def _child(which: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.index", which, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            run("index", measure)
        case ["ours", folder]:
            print(json.dumps(measure_ours(Path(folder))))
        case ["peer", samples]:
            print(json.dumps(measure_peer(int(samples))))
