"""What a preprocessing worker does, one task at a time: hash an input, tokenize a block, assemble a shard.

data/tokenize.py hands the tasks out. Each leaves its files and then a small record, the record last: after a
kill, tasks with a record are kept and the others start over, so nothing is counted twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_smol.data.corpus import Block, Document, read_documents
from megatron_smol.data.files import explained_disk_errors, sha256_file, write_whole
from megatron_smol.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megatron_smol.data.sentences import Splitter, sentence_splitter
from megatron_smol.data.shuffle import (
    Documents,
    KeyRange,
    concatenated,
    document_keys,
    documents_of,
    merged_runs,
)
from megatron_smol.data.tokenizer import Tokenizer, disagreement
from megatron_smol.errors import DataError

_BATCH_CHARACTERS = 2 << 20
_CHECKED_TEXTS, _CHECKED_CHARACTERS = 4, 2000  # of each block, against Hugging Face's ids

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What decides the output besides the inputs. Travels to each worker once."""

    tokenizer: Tokenizer
    json_key: str
    append_eod: bool
    seed: int | None
    sentences: str | None  # language of the splitter
    keep_newlines: bool
    skip_bad: bool
    work: Path  # folder of blocks and records, removed at the end
    output: Path  # folder of the shards

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.tokenizer.vocab_size)

    @cached_property
    def splitter(self) -> Splitter | None:
        return sentence_splitter(self.sentences, self.keep_newlines) if self.sentences else None

    def block_prefix(self, number: int) -> Path:
        return self.work / f"block-{number:06d}"


@dataclass(frozen=True)
class HashInput:
    file: Path

    def run(self, settings: Settings) -> Record:
        return {"path": str(self.file), "bytes": self.file.stat().st_size, "sha256": sha256_file(self.file)}


@dataclass(frozen=True)
class TokenizeBlock:
    block: Block

    def run(self, settings: Settings) -> Record:
        counts = {"tokens": 0, "documents": 0, "empty": 0, "bad": 0, "dropped": 0}
        parts = list(_encoded(self.block, settings, counts))
        documents = concatenated(parts)
        counts["documents"], counts["tokens"] = documents.sequences.size, documents.ids.size
        prefix = settings.block_prefix(self.block.number)
        if settings.seed is not None:
            keys = document_keys(settings.seed, self.block.number, documents.sequences.size)
            order = np.argsort(keys)
            documents = documents.reordered(order)
            with explained_disk_errors(keys_path(prefix), keys.nbytes):
                np.save(keys_path(prefix), keys[order])
        with IndexedWriter(prefix, settings.dtype) as writer:
            writer.add_documents(documents.ids, documents.lengths, documents.sequences)
            writer.finalize()
        record = {"block": self.block.number, "input_bytes": self.block.input_bytes, **counts}
        write_whole(record_path(prefix), json.dumps(record))
        return record


@dataclass(frozen=True)
class AssembleShard:
    """One shard of the output: a key range over all blocks, or (without a shuffle) blocks in their order."""

    name: str
    blocks: tuple[int, ...]
    keys: KeyRange | None = None
    runs: int = 1

    def run(self, settings: Settings) -> Record:
        readers = [IndexedReader(settings.block_prefix(number)) for number in self.blocks]
        if self.keys is None:
            runs: Iterable[Documents] = (documents_of(reader, 0, reader.documents) for reader in readers)
        else:
            keys = [np.load(keys_path(reader.prefix), mmap_mode="r") for reader in readers]
            runs = merged_runs(readers, keys, self.keys, self.runs)
        with IndexedWriter(settings.output / self.name, settings.dtype) as writer:
            for documents in runs:
                writer.add_documents(documents.ids, documents.lengths, documents.sequences)
            record = {"prefix": self.name, **dataclasses.asdict(writer.finalize())}
        write_whole(record_path(settings.work / self.name), json.dumps(record))
        return record


Task = HashInput | TokenizeBlock | AssembleShard


def record_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def keys_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".keys.npy")


def _encoded(block: Block, settings: Settings, counts: dict[str, int]) -> Iterator[Documents]:
    """Tokens of the block's documents, a batch at a time, in the order of the input."""

    def count_bad() -> None:
        counts["bad"] += 1

    documents = read_documents(block, settings.json_key, count_bad if settings.skip_bad else None)
    empty = np.empty(0, np.int64)
    yield Documents(empty.astype(settings.dtype), empty, empty)
    for number, batch in enumerate(_batches(documents)):
        if number == 0 and settings.tokenizer.backend != "hf":
            _check_backend(batch, settings.tokenizer)
        yield _encode_batch(batch, settings, counts)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Cut by characters, not by documents: a book and a tweet are both one document."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document))
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_batch(batch: list[Document], settings: Settings, counts: dict[str, int]) -> Documents:
    if settings.splitter is not None:
        batch = [[part for text in document for part in settings.splitter(text)] for document in batch]
    texts = list(itertools.chain.from_iterable(batch))
    encoded, unwritable = _encode(settings.tokenizer, texts)
    counts["dropped"] += encoded.dropped + unwritable
    # Sequences without ids vanish (as in Megatron), and so do documents without sequences.
    kept = encoded.lengths > 0
    owner = np.repeat(np.arange(len(batch)), [len(document) for document in batch])[kept]
    sequences = np.bincount(owner, minlength=len(batch)).astype(np.int64)
    counts["empty"] += int((sequences == 0).sum())
    sequences = sequences[sequences > 0]
    ids, lengths = encoded.ids.astype(settings.dtype), encoded.lengths[kept]
    if settings.append_eod and sequences.size:
        last = np.cumsum(sequences) - 1
        ids = np.insert(ids, np.cumsum(lengths)[last], settings.tokenizer.eod_id)
        lengths[last] += 1
    return Documents(ids, lengths, sequences)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[Any, int]:
    """Encode; half a surrogate pair is no character, so it is dropped first and counted."""
    try:
        return tokenizer.encode_flat(texts), 0
    except UnicodeEncodeError:
        writable = [text.encode(errors="ignore").decode() for text in texts]
        dropped = sum(map(len, texts)) - sum(map(len, writable))
        return tokenizer.encode_flat(writable), dropped


def _check_backend(batch: list[Document], tokenizer: Tokenizer) -> None:
    texts = [text[:_CHECKED_CHARACTERS] for document in batch[:_CHECKED_TEXTS] for text in document[:1]]
    texts = [text.encode(errors="ignore").decode() for text in texts]
    if (text := disagreement(tokenizer, texts)) is not None:
        raise DataError(
            f"the fast tokenizer backend gives other ids than Hugging Face for {text[:80]!r}; run the "
            f"command again with --backend hf, and please report this text"
        )
