"""What a phase leaves for the next, and the documents at the end: one file a task, whole or absent.

A task that is run again after a kill removes what its killed writers left beside the file. A writer that is still at
work somewhere (its command was killed, or the same command runs twice) then has nothing to rename and ends.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from megatron_smol.data.corpus import opened
from megatron_smol.data.files import PARTIAL, flush_to_disk, partial_path, publish
from megatron_smol.errors import DataError


def part(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.jsonl.zst"


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes are at `path` once all are there; DataError when another writer took over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
        stale.unlink(missing_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as stream:
            yield stream
            flush_to_disk(stream)
        try:
            publish(partial, path)
        except FileNotFoundError:
            raise DataError(
                f"{path} is being made by another run of the same command; this one ends"
            ) from None
    finally:
        partial.unlink(missing_ok=True)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """A .npy that is whole or absent."""
    with written(path) as stream:
        np.save(stream, array)


class ReadPart(PipelineStep):
    """What this rank of the phase before wrote, in its order."""

    type, name = "read", "part"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with opened(part(self.folder, rank)) as stream:
            for line in stream:
                record = orjson.loads(line)
                yield Document(text=record["text"], id=record["id"], metadata=record["metadata"])


class WritePart(PipelineStep):
    """Writes {text, id, metadata} lines; the same bytes whenever they are made."""

    type, name = "write", "part"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        import zstandard

        with (
            written(part(self.folder, rank)) as raw,
            zstandard.ZstdCompressor(3).stream_writer(raw, closefd=False) as stream,
        ):
            for document in data:
                self.stat_update("total")
                record = {"text": document.text, "id": document.id, "metadata": document.metadata}
                stream.write(orjson.dumps(record, default=str) + b"\n")
        yield from ()
