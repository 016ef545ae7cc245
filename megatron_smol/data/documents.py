"""Which documents a stretch of a source's tokens comes from. Used by inspect.py and find.py.

A document is named by its shard's prefix and its number in that shard, from 0, as megatron-core's
IndexedDataset counts them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megatron_smol.data.source import TokenSource


@dataclass(frozen=True)
class DocumentPart:
    """`tokens` tokens of a document, from its token `position` on."""

    shard: str
    document: int
    position: int
    tokens: int
    document_tokens: int
    first_token: int  # of the document, in the source

    @property
    def whole(self) -> bool:
        return self.tokens == self.document_tokens


class Documents:
    """The documents of one source. Only the pages of the index that a lookup touches are read from disk."""

    def __init__(self, source: TokenSource) -> None:
        self.source = source
        if source.manifest is not None:
            self._names = [record.prefix for record in source.manifest.shards]
            sizes = [record.tokens for record in source.manifest.shards]
        else:
            self._names = [shard.prefix.name for shard in source.shards]
            sizes = [shard.tokens for shard in source.shards]
        self._first_tokens = list(accumulate(sizes, initial=0))

    def parts(self, start: int, count: int) -> Iterator[DocumentPart]:
        """The parts of documents that make up the tokens [start, start + count) of the source, in order."""
        stop = start + count
        if start < 0 or count < 0 or stop > self.source.tokens:
            raise IndexError(
                f"tokens [{start}, {stop}) of source '{self.source.name}', which has {self.source.tokens}"
            )
        while start < stop:
            number = bisect_right(self._first_tokens, start) - 1
            for part in self._in_shard(number, start, min(stop, self._first_tokens[number + 1])):
                yield part
                start += part.tokens

    def _in_shard(self, number: int, start: int, stop: int) -> Iterator[DocumentPart]:
        shard, base = self.source.shards[number], self._first_tokens[number]
        item = shard.dtype.itemsize

        def begin(document: int) -> int:
            sequence = int(shard.document_bounds[document])
            return base + (
                int(shard.offsets[sequence]) // item if sequence < shard.sequences else shard.tokens
            )

        # Empty sequences and documents begin where the next one does: the last of them holds the token.
        sequence = int(np.searchsorted(shard.offsets, (start - base) * item, "right")) - 1
        document = int(np.searchsorted(shard.document_bounds, sequence, "right")) - 1
        first = begin(document)
        while start < stop:
            end = begin(document + 1)
            if end > start:
                tokens = min(stop, end) - start
                yield DocumentPart(
                    self._names[number], document, start - first, tokens, end - first, first_token=first
                )
                start += tokens
            document, first = document + 1, end
