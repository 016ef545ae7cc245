"""What a preprocessing worker does, one task at a time: hash an input, or tokenize a block of it.

data/tokenize.py hands the tasks out; data/assembly.py has the last kind. Each leaves its files and then a small record, the record last: after a
kill, tasks with a record are kept and the others start over, so nothing is counted twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_smol.data.corpus import Block
from megatron_smol.data.files import explained_disk_errors, write_whole
from megatron_smol.data.indexed import IndexedWriter, TokenArray, token_dtype
from megatron_smol.data.inputs import InputFile
from megatron_smol.data.longtext import LongDocument
from megatron_smol.data.reading import LongRow, Reading, Row
from megatron_smol.data.sentences import Splitter, sentence_splitter
from megatron_smol.data.shuffle import (
    ORIGIN,
    Documents,
    Part,
    concatenated,
    document_keys,
)
from megatron_smol.data.tokenizer import Encoded, Tokenizer, disagreement
from megatron_smol.errors import DataError

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 2 << 20, 1 << 16
_PART_TOKENS = 32 << 20
_PIECE_CHARACTERS = 1 << 20  # of a long document, tokenized at a time
_UNCUT_CHARACTERS = 32 << 20  # without a single place to cut: no text
_CHECKED_TEXTS, _CHECKED_CHARACTERS = 4, 2000  # of each block, against Hugging Face's ids

Record = dict[str, Any]


class Task(Protocol):
    """A piece of work that travels to a worker process."""

    def run(self, settings: Settings) -> Record: ...


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
    min_doc_tokens: int | None
    max_doc_tokens: int | None
    provenance: bool
    work: Path  # folder of parts and records, removed at the end
    output: Path  # folder of the shards

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.tokenizer.vocab_size)

    @cached_property
    def splitter(self) -> Splitter | None:
        return sentence_splitter(self.sentences, self.keep_newlines) if self.sentences else None

    @property
    def cuts_long_documents(self) -> bool:
        return self.sentences is None and self.tokenizer.cuts is not None

    def wants(self, tokens: TokenArray) -> tuple[TokenArray, TokenArray]:
        """Which documents are (too short, too long), by their tokens without the end of document."""
        return tokens < (self.min_doc_tokens or 0), tokens > (self.max_doc_tokens or np.inf)

    def record(self, name: str) -> Path:
        """The small file that a finished task leaves."""
        return self.work / f"{name}.json"

    def has(self, name: str) -> bool:
        return self.record(name).exists()

    def read(self, name: str) -> Record:
        found: Record = json.loads(self.record(name).read_text())
        return found


@dataclass(frozen=True)
class HashInput:
    number: int
    file: InputFile

    @property
    def name(self) -> str:
        return f"input-{self.number:06d}"

    def run(self, settings: Settings) -> Record:
        """An object store's own version stands for the content, which would be transferred twice otherwise."""
        file = self.file
        record: Record = {"path": file.name, "bytes": file.size, "sha256": "", "etag": None}
        if file.is_remote and file.version:
            record["etag"] = file.version
        else:
            with file.open() as stream:
                record["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        write_whole(settings.record(self.name), json.dumps(record))
        return record


@dataclass(frozen=True)
class TokenizeBlock:
    block: Block

    def run(self, settings: Settings) -> Record:
        block = self.block
        reading = Reading(block, settings.json_key, settings.skip_bad)
        writer = _BlockWriter(block, settings)
        for number, batch in enumerate(_batches(reading.documents(), settings.cuts_long_documents)):
            if isinstance(batch, list):
                if number == 0 and settings.tokenizer.backend != "hf":
                    _check_backend(batch, settings.tokenizer)
                writer.add(batch)
            else:
                try:
                    writer.add_long(batch)
                except ValueError as error:
                    if isinstance(error, DataError):
                        raise
                    reading.refuse(error)
        writer.write_part()
        record = {
            "unit": block.unit,
            "index": block.index,
            "input_bytes": block.input_bytes,
            "rows": reading.rows,
            "bad": reading.bad,
            **dataclasses.asdict(writer.counts),
            "parts": writer.parts,
        }
        write_whole(settings.record(block.name), json.dumps(record))
        if block.spooled is not None:
            Path(block.spooled.name).unlink(missing_ok=True)
        return record


@dataclass
class Counts:
    tokens: int = 0
    documents: int = 0
    empty: int = 0
    dropped: int = 0  # characters
    too_short: int = 0  # documents, by --min-doc-tokens
    too_long: int = 0
    filtered_tokens: int = 0


class _BlockWriter:
    """Tokenizes the documents of a block and writes them as parts."""

    def __init__(self, block: Block, settings: Settings) -> None:
        self._block, self._settings = block, settings
        self._pending: list[Documents] = []
        self._pending_tokens = 0
        self.counts = Counts()
        self.parts: list[Record] = []

    def add(self, batch: list[Row]) -> None:
        documents = _encode_batch(batch, self._settings, self.counts)
        origins = self._origins(batch)
        self._pending.append(dataclasses.replace(documents, origins=origins[documents.origins]))
        self._pending_tokens += documents.ids.size
        if self._pending_tokens >= _PART_TOKENS:
            self.write_part()

    def add_long(self, row: LongRow) -> None:
        """Raises ValueError when the document turns out to be bad; then it leaves nothing."""
        settings, counts = self._settings, self.counts
        self.write_part()  # so that parts follow the order of the input
        origins = self._origins([row])
        part = self._next_part(int(origins["key"][0]))
        with IndexedWriter(part.prefix, settings.dtype) as writer:
            lengths, dropped = _encode_long(row.document, settings.tokenizer, writer)
            counts.dropped += dropped
            if _keep(np.array([sum(lengths)]), settings, counts).any():
                if settings.append_eod:
                    writer.add_tokens(np.array([settings.tokenizer.eod_id], dtype=settings.dtype))
                    lengths[-1] += 1
                writer.end_documents(np.array(lengths), np.array([len(lengths)]))
                self._finish(part, writer, origins)

    def write_part(self) -> None:
        pending, self._pending, self._pending_tokens = self._pending, [], 0
        if not any(documents.sequences.size for documents in pending):
            return
        documents = concatenated(pending)
        del pending
        part = self._next_part(None)
        origins = []
        with IndexedWriter(part.prefix, self._settings.dtype) as writer:
            for some in documents.by_key() if self._settings.seed is not None else (documents,):
                writer.add_documents(some.ids, some.lengths, some.sequences)
                origins.append(some.origins)
            self._finish(part, writer, np.concatenate(origins))

    def _finish(self, part: Part, writer: IndexedWriter, origins: TokenArray) -> None:
        with explained_disk_errors(part.origins_path, origins.nbytes):
            np.save(part.origins_path, origins)
        summary = writer.finalize()
        self.counts.documents += summary.documents
        self.counts.tokens += summary.tokens
        self.parts.append({"name": part.prefix.name, "tokens": summary.tokens, "long_key": part.long_key})

    def _next_part(self, long_key: int | None) -> Part:
        return Part(self._settings.work / f"{self._block.name}-{len(self.parts):03d}", long_key=long_key)

    def _origins(self, batch: Sequence[Row | LongRow]) -> TokenArray:
        origins = np.empty(len(batch), ORIGIN)
        origins["row"] = rows = np.array([row.row for row in batch], dtype=np.uint64)
        origins["input"] = inputs = np.array([row.input for row in batch], dtype=np.uint64)
        # In a block of text files the files are the rows.
        ordinals = inputs - np.uint64(self._block.first_input) if self._block.kind == "text" else rows
        origins["key"] = document_keys(self._settings.seed, self._block.unit, self._block.index, ordinals)
        return origins


def _batches(rows: Iterable[Row | LongRow], cut_long: bool) -> Iterator[list[Row] | LongRow]:
    """Cut by characters, not by documents: a book and a tweet are both one document. A document that is too
    long to hold comes alone."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        if isinstance(row, LongRow):
            if cut_long:
                if batch:
                    yield batch
                    batch, characters = [], 0
                yield row
                continue
            row = Row(_held(row.document), row.row, row.input)
        batch.append(row)
        characters += sum(map(len, row.document))
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _held(document: LongDocument) -> list[str]:
    """A long document after all, for a tokenizer or a sentence splitter that needs it whole."""
    texts: list[str] = []
    pieces: list[str] = []
    for piece in document.pieces():
        if piece is None:
            texts.append("".join(pieces))
            pieces = []
        else:
            pieces.append(piece)
    return texts


def _encode_batch(batch: list[Row], settings: Settings, counts: Counts) -> Documents:
    """Their documents that are kept; `origins` are their numbers in the batch."""
    texts_of = [row.document for row in batch]
    if settings.splitter is not None:
        texts_of = [[part for text in document for part in settings.splitter(text)] for document in texts_of]
    texts = list(itertools.chain.from_iterable(texts_of))
    encoded = _encode(settings.tokenizer, texts)
    counts.dropped += encoded.dropped
    ids, lengths = encoded.ids.astype(settings.dtype), encoded.lengths
    owner = np.repeat(np.arange(len(batch)), [len(document) for document in texts_of])
    # Sequences without ids vanish (as in Megatron), and so do documents without sequences.
    kept_documents = _keep(
        np.bincount(owner, lengths, minlength=len(batch)).astype(np.int64), settings, counts
    )
    kept = (lengths > 0) & kept_documents[owner]
    if not kept.all():
        ids, lengths, owner = ids[np.repeat(kept, lengths)], lengths[kept], owner[kept]
    sequences = np.bincount(owner, minlength=len(batch)).astype(np.int64)[kept_documents]
    if settings.append_eod and sequences.size:
        last = np.cumsum(sequences) - 1
        ids = np.insert(ids, np.cumsum(lengths)[last], settings.tokenizer.eod_id)
        lengths[last] += 1
    return Documents(ids, lengths, sequences, np.flatnonzero(kept_documents))


def _keep(tokens: TokenArray, settings: Settings, counts: Counts) -> TokenArray:
    """Which documents are written, by their tokens without the end of document."""
    empty = tokens == 0
    too_short, too_long = (wrong & ~empty for wrong in settings.wants(tokens))
    counts.empty += int(empty.sum())
    counts.too_short += int(too_short.sum())
    counts.too_long += int(too_long.sum())
    counts.filtered_tokens += int(tokens[too_short | too_long].sum())
    kept: TokenArray = ~(empty | too_short | too_long)
    return kept


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Encode; half a surrogate pair is no character, so it is dropped first and counted."""
    try:
        return tokenizer.encode_flat(texts)
    except UnicodeEncodeError:
        writable = [text.encode(errors="ignore").decode() for text in texts]
        encoded = tokenizer.encode_flat(writable)
        halves = sum(map(len, texts)) - sum(map(len, writable))
        return encoded._replace(dropped=encoded.dropped + halves)


def _encode_long(
    document: LongDocument, tokenizer: Tokenizer, writer: IndexedWriter
) -> tuple[list[int], int]:
    """Tokenize piece by piece, cut where the ids of the pieces are those of the whole (data/boundary.py).

    Returns the lengths of the sequences that have ids, and the number of dropped characters.
    """
    cuts = tokenizer.cuts
    assert cuts is not None
    lengths, dropped, text, searched, length = [], 0, "", 0, 0

    def write(piece: str) -> int:
        encoded = tokenizer.encode_flat([piece])
        writer.add_tokens(encoded.ids.astype(writer.dtype))
        nonlocal dropped
        dropped += encoded.dropped
        return encoded.ids.size

    for piece in document.pieces():
        if piece is None:
            length += write(text)
            if length:
                lengths.append(length)
            text, searched, length = "", 0, 0
            continue
        writable = piece.encode(errors="ignore").decode()
        dropped += len(piece) - len(writable)
        text += writable
        if len(text) - searched < _PIECE_CHARACTERS:
            continue
        if cut := cuts.last(text, searched):
            length += write(text[:cut])
            text, searched = text[cut:], 0
        elif len(text) > _UNCUT_CHARACTERS:
            raise ValueError(
                f"{len(text):,} characters without a space or a punctuation mark are no text, and cannot be "
                f"tokenized in pieces (they begin with {text[:40]!r})"
            )
        else:
            searched = len(text) - 1
    return lengths, dropped


def _check_backend(batch: list[Row], tokenizer: Tokenizer) -> None:
    texts = [text[:_CHECKED_CHARACTERS] for row in batch[:_CHECKED_TEXTS] for text in row.document[:1]]
    texts = [text.encode(errors="ignore").decode() for text in texts]
    if (text := disagreement(tokenizer, texts)) is not None:
        raise DataError(
            f"the fast tokenizer backend gives other ids than Hugging Face for {text[:80]!r}; run the "
            f"command again with --backend hf, and please report this text"
        )
