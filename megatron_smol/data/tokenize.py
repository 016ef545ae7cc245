"""Text to token shards: `smol preprocess` and tools/preprocess_data.py call `preprocess`.

Three passes over small tasks, shared among worker processes: hash the inputs; tokenize their blocks
(data/corpus.py) into sorted pieces under a work folder; assemble the pieces into shards, in a global order
that a recorded seed decides (data/shuffle.py), or in the order of the input. The manifest comes last and the
work folder goes. Output depends on inputs and settings only, not on the workers, nor on kills and restarts in
between. While it runs, the disk holds the tokens twice.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_smol import __version__
from megatron_smol.data.corpus import BLOCK_BYTES, expand_inputs, iter_blocks, read_documents
from megatron_smol.data.encode import (
    AssembleShard,
    HashInput,
    Record,
    Settings,
    TokenizeBlock,
    record_path,
)
from megatron_smol.data.files import PARTIAL, check_room, write_whole
from megatron_smol.data.manifest import (
    FOLDER_MANIFEST,
    PREFIX_MANIFEST,
    Manifest,
    ShardRecord,
    read_manifest,
)
from megatron_smol.data.progress import Progress
from megatron_smol.data.shuffle import ALL_KEYS, RUN_TOKENS
from megatron_smol.data.source import load_source
from megatron_smol.data.tokenizer import Tokenizer, choose_backend, load_tokenizer
from megatron_smol.data.workers import Workers, one_thread_each
from megatron_smol.errors import DataError, UserError

SHARD_TOKENS = 256 << 20  # 512 MB of uint16
_PLAN, _LOCK = "plan.json", "lock"
_SAMPLED_FILES, _SAMPLED_TEXTS, _SAMPLED_CHARACTERS = 16, 32, 8192


@dataclass(frozen=True)
class Layout:
    """Where the output lies: a folder of shards, or one Megatron prefix."""

    folder: Path
    prefix: str | None

    @classmethod
    def of_prefix(cls, path: str | Path) -> Layout:
        return cls(Path(path).parent, Path(path).name)

    @property
    def manifest(self) -> Path:
        return self.folder / (self.prefix + PREFIX_MANIFEST if self.prefix else FOLDER_MANIFEST)

    @property
    def work(self) -> Path:
        return self.folder / f".{self.prefix or 'source'}.preprocess"

    @property
    def name(self) -> str:
        return self.prefix or self.folder.resolve().name

    @property
    def path(self) -> Path:
        return self.folder / self.prefix if self.prefix else self.folder

    def shard(self, number: int) -> str:
        return self.prefix or f"shard-{number:05d}"

    def shard_files(self) -> list[Path]:
        stem = self.prefix or "shard-*"
        return [file for end in (".bin", ".idx") for file in self.folder.glob(stem + end)]


def preprocess(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path | Tokenizer,
    *,
    layout: Literal["folder", "prefix"] = "folder",
    json_key: str = "text",
    source: str | None = None,
    append_eod: bool = True,
    workers: int | None = None,
    seed: int | None = 0,
    backend: Literal["auto", "hf"] = "auto",
    split_sentences: bool = False,
    keep_newlines: bool = False,
    language: str = "english",
    skip_bad: bool = False,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    log_interval: int = 10_000,
) -> Manifest:
    """Tokenize text into a source that recipes and megatron-core read; returns its manifest.

    `output` is a folder of shards, or (layout "prefix") the path of one .bin/.idx pair without the ending.
    `seed` decides the order of the documents; None keeps the order of the input. The same call again
    continues what a kill interrupted, and returns at once when all is done; other settings at the same place
    need `overwrite`.
    """
    one_thread_each()
    files = expand_inputs(inputs)
    place = Layout(Path(output), None) if layout == "folder" else Layout.of_prefix(output)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    if backend == "auto":
        tokenizer = choose_backend(tokenizer, _sample(files, json_key))
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed must be between 0 and 2^64 - 1, found {seed}")
    settings = Settings(
        tokenizer=tokenizer,
        json_key=json_key,
        append_eod=append_eod,
        seed=seed,
        sentences=language if split_sentences else None,
        keep_newlines=keep_newlines,
        skip_bad=skip_bad,
        work=place.work,
        output=place.folder,
    )
    _ = settings.splitter  # a missing sentence model stops here, not in a worker
    progress = Progress(sum(file.stat().st_size for file in files), log_interval)
    with _locked(place.work), Workers(_worker_count(workers, files), settings) as pool:
        hashes = {record["path"]: record for record in pool.run(map(HashInput, files))}
        wanted = _description(settings, source or place.name, [hashes[str(file)] for file in files])
        finished = _finished(place, wanted, overwrite, progress)
        if finished is None:
            finished = _build(pool, files, place, settings, wanted, shard_tokens, progress)
        shutil.rmtree(place.work)
    return finished


def _build(
    pool: Workers,
    files: Sequence[Path],
    place: Layout,
    settings: Settings,
    wanted: Record,
    shard_tokens: int,
    progress: Progress,
) -> Manifest:
    """Everything between the hashes of the inputs and a finished manifest; continues what is in the work
    folder."""
    _prepare_work(place, {**wanted, "block_bytes": BLOCK_BYTES, "shard_tokens": shard_tokens}, progress)
    with progress:
        blocks = _tokenize(pool, files, settings, progress)
        tasks = _shard_tasks(blocks, place, settings, shard_tokens)
        shards = _assemble(pool, tasks, settings, progress)
    manifest = Manifest(
        **wanted,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        empty_documents=sum(block["empty"] for block in blocks),
        bad_lines=sum(block["bad"] for block in blocks),
        dropped_characters=sum(block["dropped"] for block in blocks),
        shards=tuple(shards),
        versions=_versions(settings.tokenizer),
    )
    assert manifest.tokens == sum(block["tokens"] for block in blocks), "a document was lost or counted twice"
    manifest.write(place.manifest)
    progress.summary(manifest, load_source(place.path), settings.tokenizer)
    return manifest


def _tokenize(pool: Workers, files: Sequence[Path], settings: Settings, progress: Progress) -> list[Record]:
    """Records of all blocks, in the order of the input; those of an interrupted run are taken as they are."""
    records: list[Record] = []

    def missing() -> Iterator[TokenizeBlock]:
        for block in iter_blocks(files):
            record = record_path(settings.block_prefix(block.number))
            if record.exists():
                records.append(json.loads(record.read_text()))
                progress.kept(records[-1])
            else:
                yield TokenizeBlock(block)

    for record in pool.run(missing()):
        records.append(record)
        progress.tokenized(record)
    if not any(record["tokens"] for record in records):
        names = ", ".join(map(str, files[:3]))
        raise DataError(f"no documents with text in {names}: nothing to write")
    return sorted(records, key=lambda record: int(record["block"]))


def _shard_tasks(
    blocks: Sequence[Record], place: Layout, settings: Settings, shard_tokens: int
) -> list[AssembleShard]:
    full = [block for block in blocks if block["documents"]]
    tokens = sum(block["tokens"] for block in full)
    check_room(place.folder, tokens * settings.dtype.itemsize)
    numbers = tuple(block["block"] for block in full)
    if place.prefix:
        groups, count = [numbers], 1
    else:
        # Without a shuffle a shard is whole blocks, so that the order stays the input's.
        starts = itertools.accumulate((block["tokens"] for block in full), initial=0)
        shard_of = dict(zip(numbers, (start // shard_tokens for start in starts), strict=False))
        groups = [tuple(group) for _, group in itertools.groupby(numbers, key=shard_of.__getitem__)]
        count = -(-tokens // shard_tokens)
    if settings.seed is None:
        return [AssembleShard(place.shard(number), group) for number, group in enumerate(groups)]
    runs = -(-tokens // (count * RUN_TOKENS))
    return [
        AssembleShard(place.shard(number), numbers, part, runs)
        for number, part in enumerate(ALL_KEYS.split(count))
    ]


def _assemble(
    pool: Workers, tasks: Sequence[AssembleShard], settings: Settings, progress: Progress
) -> list[ShardRecord]:
    records = {}
    missing = []
    for task in tasks:
        path = record_path(settings.work / task.name)
        if path.exists():
            records[task.name] = json.loads(path.read_text())
        else:
            missing.append(task)
    for record in pool.run(missing):
        records[record["prefix"]] = record
        progress.assembled(len(records), len(tasks))
    # A key range can be empty when a source has fewer documents than shards.
    return [ShardRecord(**records[task.name]) for task in tasks if records[task.name]["documents"]]


def _description(settings: Settings, source: str, inputs: Sequence[Record]) -> Record:
    """The part of the manifest that is known before the work: two runs that agree on it write the same bytes."""
    tokenizer = settings.tokenizer
    return {
        "source": source,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "dtype": settings.dtype.name,
        "append_eod": settings.append_eod,
        "json_key": settings.json_key,
        "sentences": settings.sentences,
        "keep_newlines": settings.keep_newlines,
        "seed": settings.seed,
        "inputs": list(inputs),
    }


def _finished(place: Layout, wanted: Record, overwrite: bool, progress: Progress) -> Manifest | None:
    """The manifest of an earlier run of the same command, if all is whole; another's output is refused."""
    plan = place.work / _PLAN
    if place.manifest.exists():
        if not overwrite:
            found = read_manifest(place.manifest)
            known, asked = _content(found.model_dump()), _content(wanted)
            if differing := [field for field in asked if known[field] != asked[field]]:
                raise UserError(
                    f"{place.manifest} was made with another {' and '.join(differing)}; use --overwrite to "
                    f"replace it, or choose another output"
                )
            try:
                load_source(place.path)
            except DataError as error:
                progress.note(f"making it again: {error}")
            else:
                progress.note(f"{place.manifest} is complete: {found.tokens:,} tokens; nothing to do")
                return found
        # Without a plan, _prepare_work clears what is left.
        plan.unlink(missing_ok=True)
        place.manifest.unlink()
    elif not overwrite and not plan.exists() and (shards := place.shard_files()):
        raise UserError(
            f"{shards[0]} exists and was not made by this command; use --overwrite to replace it, or choose "
            f"another output"
        )
    return None


def _content(fields: Record) -> Record:
    """A description without the names of files and folders, which may be given in another way next time."""
    inputs = [(given["bytes"], given["sha256"]) for given in fields["inputs"]]
    return {**fields, "tokenizer": {**fields["tokenizer"], "name": None}, "inputs": inputs}


def _prepare_work(place: Layout, plan: Record, progress: Progress) -> None:
    """Keep the work of an interrupted run of the same command; else begin anew."""
    path = place.work / _PLAN
    text = json.dumps(_content(plan), indent=1)
    if path.exists() and path.read_text() == text:
        progress.note(f"continuing the interrupted run in {place.work}")
    else:
        for file in (*place.work.iterdir(), *place.shard_files()):
            if file.name != _LOCK:
                file.unlink()
        write_whole(path, text)
    for folder in (place.folder, place.work):
        for file in folder.glob(f"*{PARTIAL}"):
            file.unlink()


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process, however it ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is writing to {work.parent}; wait for it, or stop it") from None
        try:
            yield
        finally:
            if list(work.glob("*")) == [work / _LOCK]:  # refused before any work
                shutil.rmtree(work)


def _worker_count(workers: int | None, files: Sequence[Path]) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, found {workers}")
    # A worker takes a second to start: not worth it for less than a block.
    blocks = -(-sum(file.stat().st_size for file in files) // BLOCK_BYTES)
    return workers or max(1, min(len(os.sched_getaffinity(0)), blocks))


def _sample(files: Sequence[Path], json_key: str) -> list[str]:
    """Some of the very input, for the comparison of tokenizer backends."""
    texts: list[str] = []
    for file in files[:: -(-len(files) // _SAMPLED_FILES)]:
        block = next(iter_blocks([file]), None)
        documents = read_documents(block, json_key, on_bad=lambda: None) if block else iter(())
        for document in itertools.islice(documents, _SAMPLED_TEXTS):
            texts += [text[:_SAMPLED_CHARACTERS].encode(errors="ignore").decode() for text in document]
    return texts


def _versions(tokenizer: Tokenizer) -> dict[str, str]:
    used = ["tokenizers", "numpy", *(["splintr-rs"] if tokenizer.backend == "splintr" else [])]
    return {"megatron_smol": __version__, **{name: importlib.metadata.version(name) for name in used}}
