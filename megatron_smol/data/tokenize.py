"""Text to token shards: `smol preprocess` and tools/preprocess_data.py call `preprocess`.

Three passes over small tasks, shared among worker processes: hash the inputs; tokenize their blocks
(data/corpus.py) into sorted parts under a work folder (data/place.py); assemble the parts into shards, in a
global order that a recorded seed decides (data/shuffle.py), or in the order of the input. The manifest comes
last and the work folder goes. The tasks of an array job do a share of the first two passes each; the one that
ends last does the third. Output depends on inputs and settings only, not on workers or tasks, nor on kills and
restarts in between. While it runs, the disk holds the tokens twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_smol.data import corpus
from megatron_smol.data.assembly import Assembly, describe
from megatron_smol.data.corpus import Block, Unit, cut_units, numbered
from megatron_smol.data.encode import HashInput, Record, Settings, TokenizeBlock
from megatron_smol.data.files import require_folder, write_whole
from megatron_smol.data.inputs import InputFile, expand_inputs
from megatron_smol.data.manifest import Manifest, read_manifest
from megatron_smol.data.place import PLAN, Place, Share
from megatron_smol.data.progress import Progress
from megatron_smol.data.reading import head_of
from megatron_smol.data.source import load_source
from megatron_smol.data.tokenizer import Tokenizer, choose_backend, load_tokenizer
from megatron_smol.data.workers import Workers, one_thread_each
from megatron_smol.errors import DataError, UserError

SHARD_TOKENS = 256 << 20  # 512 MB of uint16
_SAMPLED_FILES, _SAMPLED_TEXTS, _SAMPLED_CHARACTERS = 16, 16, 1024
_SAMPLED_BYTES = 1 << 20  # read from each sampled file


def preprocess(
    inputs: Sequence[str | Path | InputFile],
    output: str | Path,
    tokenizer: str | Path | Tokenizer,
    *,
    layout: Literal["folder", "prefix"] = "folder",
    json_key: str = "text",
    source: str | None = None,
    append_eod: bool = True,
    workers: int | None = None,
    share: Share | None = None,
    seed: int | None = 0,
    backend: Literal["auto", "hf"] = "auto",
    split_sentences: bool = False,
    keep_newlines: bool = False,
    language: str = "english",
    min_doc_tokens: int | None = None,
    max_doc_tokens: int | None = None,
    provenance: bool = True,
    skip_bad: bool = False,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    log_interval: int = 10_000,
) -> Manifest | None:
    """Tokenize text into a source that recipes and megatron-core read; returns its manifest.

    `output` is a folder of shards, or (layout "prefix") the path of one .bin/.idx pair without the ending.
    `seed` decides the order of the documents; None keeps the order of the input. The same call again
    continues what a kill interrupted, and returns at once when all is done; other settings at the same place
    need `overwrite`. With a `share` it does that part of the work, and returns None unless it was the last.
    """
    one_thread_each()
    share = share or Share()
    files = expand_inputs(inputs)
    if layout == "folder":
        require_folder(Path(output))
    place = Place(Path(output), None) if layout == "folder" else Place.of_prefix(output)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    if backend == "auto":
        tokenizer = choose_backend(tokenizer, _sample(files, json_key))
    settings = Settings(
        tokenizer=tokenizer,
        json_key=json_key,
        append_eod=append_eod,
        seed=seed,
        sentences=language if split_sentences else None,
        keep_newlines=keep_newlines,
        skip_bad=skip_bad,
        min_doc_tokens=min_doc_tokens,
        max_doc_tokens=max_doc_tokens,
        provenance=provenance,
        work=place.work,
        output=place.folder,
    )
    _check(settings)
    source = source or place.name
    plan = _plan(settings, source, files, shard_tokens)
    digest = hashlib.sha256(plan.encode()).hexdigest()[:16]
    settings = dataclasses.replace(settings, work=place.work / digest)
    job = _Job(files, place, settings, source, share, shard_tokens, overwrite)
    with place.claimed(share):
        job.refuse_foreign_shards()
        with Workers(_worker_count(workers, files, share), settings) as pool:
            return job.run(pool, plan, log_interval)


class _Job:
    """One call of `preprocess`, or what one task of an array job does of it."""

    def __init__(
        self,
        files: Sequence[InputFile],
        place: Place,
        settings: Settings,
        source: str,
        share: Share,
        shard_tokens: int,
        overwrite: bool,
    ) -> None:
        self.files, self.place, self.settings, self.source = files, place, settings, source
        self.share, self.shard_tokens, self.overwrite = share, shard_tokens, overwrite
        self.units = cut_units(files)

    def run(self, pool: Workers, plan: str, log_interval: int) -> Manifest | None:
        own_bytes = sum(self._own_bytes(unit, first) for unit, first in numbered(self.units))
        with Progress(own_bytes, log_interval) as progress:
            self._begin(plan, progress)
            hashes = self._hash(pool)
            if (finished := self._finished(hashes, progress)) is not None:
                return finished
            for record in pool.run(TokenizeBlock(block) for block in self._missing_blocks(progress)):
                progress.tokenized(record)
            return self._assemble_if_last(pool, progress)

    def refuse_foreign_shards(self) -> None:
        place = self.place
        known = place.manifest.exists() or place.is_begun or self.overwrite
        if not known and (shards := place.shard_files()):
            raise UserError(
                f"{shards[0]} exists and was not made by this command; use --overwrite to replace it, or "
                f"choose another output"
            )

    def _begin(self, plan: str, progress: Progress) -> None:
        path = self.settings.work / PLAN
        if self.share.is_all:
            self.place.remove_other_work(self.settings.work.name)
        if not path.exists():
            self.settings.work.mkdir(exist_ok=True)
            write_whole(path, plan)
        elif self.share.is_all:
            progress.note(f"continuing the interrupted run in {self.settings.work}")

    def _hash(self, pool: Workers) -> dict[int, Record]:
        """Records of this task's share of the inputs, by their numbers."""
        tasks = [HashInput(number, file) for number, file in enumerate(self.files) if number in self.share]
        for _ in pool.run(task for task in tasks if not self.settings.has(task.name)):
            pass
        return {task.number: self.settings.read(task.name) for task in tasks}

    def _finished(self, hashes: dict[int, Record], progress: Progress) -> Manifest | None:
        """The manifest of an earlier run of the same command, if all is whole; another's output is refused."""
        path = self.place.manifest
        if not path.exists():
            return None
        found = read_manifest(path)
        if differing := self._differing(found, hashes):
            if not self.overwrite:
                raise UserError(
                    f"{path} was made with another {' and '.join(differing)}; use --overwrite to replace it, "
                    f"or choose another output"
                )
        else:
            try:
                load_source(self.place.path)
            except DataError as error:
                progress.note(f"making it again: {error}")
            else:
                progress.note(f"{path} is complete: {found.tokens:,} tokens; nothing to do")
                return found
        path.unlink(missing_ok=True)
        return None

    def _differing(self, found: Manifest, hashes: dict[int, Record]) -> list[str]:
        """Settings and inputs that are not those of a manifest. Names of files and folders do not count."""
        known, asked = found.model_dump(), describe(self.settings, self.source)
        differing = [field for field in asked if field != "tokenizer" and known[field] != asked[field]]
        if known["tokenizer"]["sha256"] != asked["tokenizer"]["sha256"]:
            differing.append("tokenizer")
        pairs = itertools.zip_longest(found.inputs, self.files)
        same_sizes = all(old and new and old.bytes == new.size for old, new in pairs)
        if not same_sizes or any(
            (found.inputs[number].sha256, found.inputs[number].etag) != (own["sha256"], own["etag"])
            for number, own in hashes.items()
        ):
            differing.append("inputs")
        return differing

    def _missing_blocks(self, progress: Progress) -> Iterator[Block]:
        """Blocks of this task's share that no earlier run has done."""
        for unit, first in numbered(self.units):
            if unit.known_blocks is not None:
                blocks: Iterable[Block] = (
                    unit.block(index) for index in range(unit.known_blocks) if first + index in self.share
                )
            elif first in self.share:
                blocks = self._counted(unit)
            else:
                continue
            for block in blocks:
                if self._is_done(block):
                    progress.kept(self.settings.read(block.name))
                else:
                    yield block

    def _counted(self, unit: Unit) -> Iterator[Block]:
        """Blocks of a unit that must be opened to know them. How many they are goes to a record: once all are
        done, the unit is not opened again."""
        if self.settings.has(unit.name):
            named = [unit.block(index) for index in range(self.settings.read(unit.name)["blocks"])]
            if all(map(self._is_done, named)):
                yield from named
                return
        count = 0
        for block in unit.blocks(self.settings.work, self._is_done):
            count += 1
            yield block
        write_whole(self.settings.record(unit.name), json.dumps({"blocks": count}))

    def _is_done(self, block: Block) -> bool:
        return self.settings.has(block.name)

    def _own_bytes(self, unit: Unit, first: int) -> int:
        if unit.known_blocks is None:
            return unit.bytes if first in self.share else 0
        own = (index for index in range(unit.known_blocks) if first + index in self.share)
        return sum(unit.block(index).input_bytes for index in own)

    def _assemble_if_last(self, pool: Workers, progress: Progress) -> Manifest | None:
        assembly = Assembly(self.units, len(self.files), self.place, self.settings, self.shard_tokens)
        if missing := assembly.missing():
            progress.note(
                f"task {self.share.rank} of {self.share.tasks} is done; {missing} of other tasks' records are "
                f"not there yet, and the task that ends last puts the shards together (if all have ended, "
                f"give any one of the commands again)"
            )
            return None
        with self.place.assembling(self.settings.work) as is_mine:
            if not is_mine:
                progress.note("another task puts the shards together")
                return None
            if self.place.manifest.exists():  # it did, between our two looks
                return read_manifest(self.place.manifest)
            return assembly.run(pool, self.source, progress)


def _check(settings: Settings) -> None:
    if settings.seed is not None and not 0 <= settings.seed < 2**64:
        raise UserError(f"--seed must be between 0 and 2^64 - 1, found {settings.seed}")
    least, most = settings.min_doc_tokens, settings.max_doc_tokens
    if (least is not None and least < 1) or (most is not None and most < (least or 1)):
        raise UserError(
            f"--min-doc-tokens {least} and --max-doc-tokens {most} let no document through: both count from "
            f"1, the first up to the second"
        )
    _ = settings.splitter  # a missing sentence model stops here, not in a worker


def _plan(settings: Settings, source: str, files: Sequence[InputFile], shard_tokens: int) -> str:
    """What decides the output, as far as it can be said without reading the inputs."""
    plan = describe(settings, source) | {
        "skip_bad": settings.skip_bad,
        "inputs": [dataclasses.asdict(file) for file in files],
        "block_bytes": corpus.BLOCK_BYTES,
        "shard_tokens": shard_tokens,
    }
    return json.dumps(plan, indent=1)


def _worker_count(workers: int | None, files: Sequence[InputFile], share: Share) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, found {workers}")
    # A worker takes half a second to start: not worth it for less than a block.
    blocks = -(-sum(file.size for file in files) // (corpus.BLOCK_BYTES * share.tasks))
    return workers or max(1, min(len(os.sched_getaffinity(0)), blocks))


def _sample(files: Sequence[InputFile], json_key: str) -> list[str]:
    """Some of the very input, for the comparison of tokenizer backends."""
    texts: list[str] = []
    for unit in cut_units(files[:: -(-len(files) // _SAMPLED_FILES)]):
        for row in itertools.islice(head_of(unit, json_key, _SAMPLED_BYTES), _SAMPLED_TEXTS):
            texts += [text[:_SAMPLED_CHARACTERS].encode(errors="ignore").decode() for text in row]
    return texts
