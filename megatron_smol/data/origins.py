"""Which document of which input each document of a shard is: `<shard>.docs.npy`, written beside the shard.

A plain NumPy file, one record a document in the order of the shard. `numpy.load(path)["row"]` reads it;
`mmap_mode="r"` opens one of any size at once.

  input        number of the input in the manifest's `inputs`
  row          line of the file, or row of the parquet file, from 0 (0 for a text file)
  first_token  where its tokens begin in the shard
  tokens       how many they are, end of document included
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from megatron_smol.data.files import (
    explained_disk_errors,
    flush_to_disk,
    partial_path,
    publish,
    sha256_file,
)
from megatron_smol.data.indexed import TokenArray

ORIGINS_END = ".docs.npy"
DOCUMENT = np.dtype([("input", "<u4"), ("row", "<u8"), ("first_token", "<u8"), ("tokens", "<u8")])


def origins_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ORIGINS_END)


class OriginsWriter:
    """Writes the file record by record; nothing is visible before finalize()."""

    def __init__(self, prefix: Path) -> None:
        self.path = origins_file(prefix)
        self._partial = partial_path(self.path)
        self._documents = self._tokens = 0
        self._stream = self._partial.open("w+b")
        self._write_header()

    def add(self, origins: TokenArray, tokens: TokenArray) -> None:
        """Documents with their ORIGIN (data/shuffle.py) and their numbers of tokens."""
        records = np.empty(origins.size, DOCUMENT)
        records["input"], records["row"], records["tokens"] = origins["input"], origins["row"], tokens
        ends = self._tokens + np.cumsum(tokens, dtype=np.int64)
        records["first_token"] = ends - tokens
        size = (self._documents + records.size) * DOCUMENT.itemsize
        with explained_disk_errors(self.path, size, clean_up=self.abort):
            self._stream.write(records.tobytes())
        self._documents += records.size
        self._tokens = int(ends[-1]) if ends.size else self._tokens

    def finalize(self) -> str:
        """Put the file in place; returns its sha256."""
        with explained_disk_errors(self.path, self._documents * DOCUMENT.itemsize, clean_up=self.abort):
            self._stream.seek(0)
            self._write_header()
            flush_to_disk(self._stream)
            self._stream.close()
        publish(self._partial, self.path)
        return sha256_file(self.path)

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # a full disk fails the last flush too
            self._stream.close()
        self._partial.unlink(missing_ok=True)

    def _write_header(self) -> None:
        # NumPy leaves room for the number of records to grow, so the header keeps its length.
        about = np.lib.format.header_data_from_array_1_0(np.empty(0, DOCUMENT))
        np.lib.format.write_array_header_1_0(self._stream, {**about, "shape": (self._documents,)})
