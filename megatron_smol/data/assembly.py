"""The last pass of preprocessing: the parts that tokenizing left become shards, and a manifest says so.

data/tokenize.py calls it when every block has its record. It reads nothing but the work folder, so any process
can do it; what an interrupted one finished is kept.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from megatron_smol import __version__
from megatron_smol.data.corpus import Unit
from megatron_smol.data.encode import Record, Settings
from megatron_smol.data.files import check_room, write_whole
from megatron_smol.data.indexed import IndexedWriter, TokenArray, bin_path
from megatron_smol.data.manifest import InputRecord, Manifest, ShardRecord
from megatron_smol.data.origins import DOCUMENT, OriginsWriter
from megatron_smol.data.place import Place
from megatron_smol.data.progress import Progress
from megatron_smol.data.shuffle import ALL_KEYS, RUN_TOKENS, Documents, KeyRange, Part, in_input_order, merged
from megatron_smol.data.tokenizer import Tokenizer
from megatron_smol.data.workers import Workers
from megatron_smol.errors import DataError

_SHARED, _TINY_TOKENS = 8, 8 << 20
_SHOWN_TOKENS = 24
_COPY_BYTES = 8 << 20
_COUNTS = ("empty", "bad", "dropped", "too_short", "too_long", "filtered_tokens")


@dataclass(frozen=True)
class AssembleShard:
    """One shard of the output: a key range over all parts, or (without a shuffle) parts in their order."""

    name: str
    parts: tuple[Part, ...]
    keys: KeyRange | None = None
    runs: int = 1

    def run(self, settings: Settings) -> Record:
        ordered = (
            in_input_order(self.parts) if self.keys is None else merged(self.parts, self.keys, self.runs)
        )
        prefix = settings.output / self.name
        record: Record = {"prefix": self.name}
        with ExitStack() as stack:
            writer = stack.enter_context(IndexedWriter(prefix, settings.dtype))
            origins = OriginsWriter(prefix) if settings.provenance else None
            if origins is not None:
                stack.callback(origins.abort)
            for documents in ordered:
                if isinstance(documents, Part):
                    documents = _copy_long(documents, writer)
                else:
                    writer.add_documents(documents.ids, documents.lengths, documents.sequences)
                if origins is not None:
                    origins.add(documents.origins, documents.tokens)
            if origins is not None:
                record["docs_sha256"] = origins.finalize()
            record |= dataclasses.asdict(writer.finalize())
        write_whole(settings.record(self.name), json.dumps(record))
        return record


class Assembly:
    """Puts together what is in a work folder."""

    def __init__(
        self, units: Sequence[Unit], inputs: int, place: Place, settings: Settings, shard_tokens: int
    ) -> None:
        self.units, self.inputs = units, inputs
        self.place, self.settings, self.shard_tokens = place, settings, shard_tokens

    def missing(self) -> int:
        """How many records of hashes, units and blocks are not there yet."""
        there = {path.name for path in self.settings.work.glob("*.json")}
        wanted = [f"input-{number:06d}.json" for number in range(self.inputs)]
        for unit in self.units:
            blocks = unit.known_blocks
            if blocks is None:
                wanted.append(f"{unit.name}.json")
                blocks = self.settings.read(unit.name)["blocks"] if wanted[-1] in there else 0
            wanted += [f"{unit.block(index).name}.json" for index in range(blocks)]
        return sum(name not in there for name in wanted)

    def run(self, pool: Workers, source: str, progress: Progress) -> Manifest:
        records, parts = self._blocks()
        totals = {name: sum(record[name] for record in records) for name in (*_COUNTS, "tokens", "documents")}
        if not totals["tokens"]:
            raise DataError(self._nothing(totals))
        self._clear(totals["tokens"], totals["documents"])
        shards = self._shards(pool, self._tasks(parts, totals["tokens"]), progress)
        manifest = Manifest(
            **describe(self.settings, source),
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            empty_documents=totals["empty"],
            bad_lines=totals["bad"],
            dropped_characters=totals["dropped"],
            short_documents=totals["too_short"],
            long_documents=totals["too_long"],
            filtered_tokens=totals["filtered_tokens"],
            shards=tuple(shards),
            inputs=tuple(
                InputRecord(**self.settings.read(f"input-{number:06d}")) for number in range(self.inputs)
            ),
            versions=_versions(self.settings.tokenizer),
        )
        counted = (totals["tokens"], totals["documents"])
        assert (manifest.tokens, manifest.documents) == counted, "a document was lost or counted twice"
        manifest.write(self.place.manifest)
        progress.summary(manifest, self._ends(shards), self.settings.tokenizer)
        return manifest

    def _ends(self, shards: Sequence[ShardRecord]) -> tuple[TokenArray, TokenArray]:
        """The first and the last tokens, to show."""
        dtype = self.settings.dtype
        first, last = (bin_path(self.place.folder / shards[end].prefix) for end in (0, -1))
        start = max(0, shards[-1].tokens - _SHOWN_TOKENS) * dtype.itemsize
        return np.fromfile(first, dtype, _SHOWN_TOKENS), np.fromfile(last, dtype, offset=start)

    def _blocks(self) -> tuple[list[Record], list[tuple[Part, int]]]:
        """Records of all blocks, and their parts with their tokens, in the order of the input."""
        records: list[Record] = []
        parts: list[tuple[Part, int]] = []
        for unit in self.units:
            blocks = unit.known_blocks
            row = 0
            for index in range(self.settings.read(unit.name)["blocks"] if blocks is None else blocks):
                record = self.settings.read(unit.block(index).name)
                records.append(record)
                for part in record["parts"]:
                    made = Part(self.settings.work / part["name"], row, part["long_key"])
                    parts.append((made, part["tokens"]))
                row += record["rows"] if unit.kind != "text" else 0
        return records, parts

    def _nothing(self, totals: dict[str, int]) -> str:
        names = ", ".join(file.name for unit in self.units[:3] for file in unit.files[:3])
        filtered = totals["too_short"] + totals["too_long"]
        why = (
            f" ({filtered:,} documents are outside --min-doc-tokens and --max-doc-tokens)" if filtered else ""
        )
        return f"no documents with text in {names}{why}: nothing to write"

    def _clear(self, tokens: int, documents: int) -> None:
        """Remove shards that are not this run's; see that there is room."""
        for file in self.place.partials():
            file.unlink()
        for file in self.place.shard_files():
            if not self.settings.has(self.place.prefix or file.name.split(".")[0]):
                file.unlink()
        beside = DOCUMENT.itemsize * documents if self.settings.provenance else 0
        check_room(self.place.folder, tokens * self.settings.dtype.itemsize + beside)

    def _tasks(self, parts: Sequence[tuple[Part, int]], tokens: int) -> list[AssembleShard]:
        count = 1 if self.place.prefix else self._shard_count(tokens)
        if self.settings.seed is None:
            # Without a shuffle a shard is whole parts, so that the order stays the input's.
            starts = itertools.accumulate((size for _, size in parts), initial=0)
            numbered = zip((part for part, _ in parts), starts, strict=False)
            groups = itertools.groupby(numbered, key=lambda pair: pair[1] * count // tokens)
            chosen = [tuple(part for part, _ in group) for _, group in groups]
            return [AssembleShard(self.place.shard(number), own) for number, own in enumerate(chosen)]
        held = sum(size for part, size in parts if part.long_key is None)
        runs = max(1, -(-held // (count * RUN_TOKENS)))
        everything = tuple(part for part, _ in parts)
        return [
            AssembleShard(self.place.shard(number), everything, keys, runs)
            for number, keys in enumerate(ALL_KEYS.split(count))
        ]

    def _shard_count(self, tokens: int) -> int:
        """As few as the limit allows, but some for the workers to share when that makes none of them tiny."""
        return max(-(-tokens // self.shard_tokens), min(_SHARED, tokens // _TINY_TOKENS))

    def _shards(self, pool: Workers, tasks: Sequence[AssembleShard], progress: Progress) -> list[ShardRecord]:
        records = {task.name: self.settings.read(task.name) for task in tasks if self.settings.has(task.name)}
        for record in pool.run(task for task in tasks if task.name not in records):
            records[record["prefix"]] = record
            progress.assembled(len(records), len(tasks))
        # A key range can be empty when a source has fewer documents than shards.
        return [ShardRecord(**records[task.name]) for task in tasks if records[task.name]["documents"]]


def describe(settings: Settings, source: str) -> Record:
    """The part of the manifest that the settings decide."""
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
        "min_doc_tokens": settings.min_doc_tokens,
        "max_doc_tokens": settings.max_doc_tokens,
    }


def _versions(tokenizer: Tokenizer) -> dict[str, str]:
    used = ["tokenizers", "numpy", *(["splintr-rs"] if tokenizer.backend == "splintr" else [])]
    return {"megatron_smol": __version__, **{name: importlib.metadata.version(name) for name in used}}


def _copy_long(part: Part, writer: IndexedWriter) -> Documents:
    """Copy a document that is too long to hold; returns its description, without ids."""
    about = part.without_ids()
    with bin_path(part.prefix).open("rb") as stream:
        while data := stream.read(_COPY_BYTES):
            writer.add_tokens(np.frombuffer(data, dtype=writer.dtype))
    writer.end_documents(about.lengths, about.sequences)
    return about
