"""Megatron-LM's own order, from the index files that an old run left in its cache, to continue that run.

The files are those of megatron-core 0.16.1: a BlendedDataset says which dataset gives sample i, and which
sample of that dataset it is; each GPTDataset has an order of documents (`document_index`), the place in it
where every window begins (`sample_index`), and the order of the windows (`shuffle_index`). Laid end to end in
the order of its document_index, a dataset is one row of tokens whose window w begins at token w * seq_length:
so a stage's rows look like those of our own order, and only the reader of their tokens is another.

Nothing is built: the arrays are mapped. `find_blend` opens a cache for recipe/plan.py; stream.py tells how
the result is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_smol.data.indexed import IndexedReader, TokenArray
from megatron_smol.data.manifest import locate, tokens_on_disk
from megatron_smol.data.source import TokenSource
from megatron_smol.data.stream import Reads, Rows, Use, split_by_epoch
from megatron_smol.errors import DataError, UserError

# Index entries looked at in one go, so that a scan of 5 billion of them stays in little memory.
CHUNK = 1 << 22
# Megatron's weights were typed by people and normalised; the recipe's are exact fractions.
WEIGHT_TOLERANCE = 1e-3


@cache
def _mapped(path: Path, dimensions: int) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(
            f"missing index file {path}: copy the whole cache of the old run, its .npy files and descriptions"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not an index file of Megatron's, or it is truncated: {error}") from None
    if array.ndim != dimensions or array.dtype.kind not in "iu":
        raise DataError(f"{path} holds {array.dtype}{list(array.shape)}, not an index of Megatron's")
    return np.asarray(array)


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair of a recipe's source."""

    source: str
    number: int  # among the source's shards
    first_token: int  # of the source
    path: Path  # without ending
    tokens: int


@dataclass(frozen=True)
class DatasetIndex:
    """The three index files of one GPTDataset, and the shard it reads."""

    stem: Path  # of its index files
    shard: Shard
    seq_length: int

    @property
    def document(self) -> NDArray[np.int32]:
        """Numbers of documents (sequences of the .idx) in the order they are read, all epochs."""
        return _mapped(self._file("document_index"), 1)

    @property
    def sample(self) -> NDArray[np.integer[Any]]:
        """[windows + 1, 2]: place in `document` and token of that document where each window begins."""
        return _mapped(self._file("sample_index"), 2)

    @property
    def shuffle(self) -> NDArray[np.integer[Any]]:
        """The window that the dataset's i-th sample is."""
        return _mapped(self._file("shuffle_index"), 1)

    @property
    def rows_per_epoch(self) -> int:
        """Megatron shuffles epochs together; a ledger counts one for as many rows as hold the shard's tokens."""
        return max(1, self.shard.tokens // self.seq_length)

    def windows_of(self, start: int, stop: int) -> list[int]:
        """The windows whose inputs hold any of the shard's tokens [start, stop), in all epochs."""
        shard = IndexedReader(self.shard.path)
        start, stop = max(0, start), min(stop, shard.tokens)
        if start >= stop:
            return []
        item = shard.dtype.itemsize
        # The last document that begins at a token's place is the one that holds it: empty ones come before it.
        held = np.array([start, stop - 1]) * item
        first, last = (np.searchsorted(shard.offsets, held, "right") - 1).tolist()
        places, windows = np.arange(first, last + 1), set()
        for place in _places(self.document, places):
            document = int(self.document[place])
            first_token = int(shard.offsets[document]) // item
            begin = max(start - first_token, 0)
            end = min(stop - first_token, int(shard.lengths[document]))
            if begin < end:
                windows |= set(range(self._window_at(place, begin), self._window_at(place, end - 1) + 1))
        return sorted(window for window in windows if window < len(self.sample) - 1)

    def _window_at(self, place: int, offset: int) -> int:
        """The window in whose inputs a token of the document at `place` lies."""
        low, high = (int(np.searchsorted(self.sample[:, 0], place, side)) for side in ("left", "right"))
        return low - 1 + int(np.searchsorted(self.sample[low:high, 1], offset, "right"))

    def _file(self, what: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}-{what}.npy")


@dataclass(frozen=True)
class MegatronOrder:
    """A stage in the order of an old run, from sample `start` of it on."""

    datasets: tuple[DatasetIndex, ...]
    blend: Path | None  # stem of the blend's files; None: the old run had a single dataset
    start: int

    @property
    def names(self) -> tuple[str, ...]:
        """The source of each dataset; a source of many shards is there many times."""
        return tuple(dataset.shard.source for dataset in self.datasets)

    @property
    def samples(self) -> int:
        """Samples that the old run's order has from `start` on."""
        whole = len(self.datasets[0].shuffle) if self.blend is None else len(self._turns[0])
        return max(0, whole - self.start)

    @property
    def _turns(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """(dataset, sample of that dataset) by sample of the blend."""
        assert self.blend is not None
        stem = self.blend
        dataset = _mapped(stem.with_name(f"{stem.name}-dataset_index.npy"), 1)
        return dataset, _mapped(stem.with_name(f"{stem.name}-dataset_sample_index.npy"), 1)

    def rows(self, start: int, stop: int) -> Rows:
        """The samples [start, stop) of the stage."""
        self._check(stop)
        turn = slice(self.start + start, self.start + stop)
        if self.blend is None:
            source, ordinal = np.zeros(stop - start, np.uint16), np.arange(turn.start, turn.stop)
        else:
            source, ordinal = (
                self._turns[0][turn].astype(np.uint16),
                self._turns[1][turn].astype(np.int64),
            )
        window, epoch = np.empty_like(ordinal), np.empty_like(ordinal)
        for index in np.unique(source).tolist():
            mine, dataset = source == index, self.datasets[index]
            if ordinal[mine].max() >= len(dataset.shuffle):
                raise DataError(f"{self.blend} asks for more windows than {dataset.stem} has: mixed caches")
            window[mine] = dataset.shuffle[ordinal[mine]]
            epoch[mine] = ordinal[mine] // dataset.rows_per_epoch
        return Rows(source, epoch, window, self.names)

    def use(self, samples: int) -> Use:
        """Rows of the first `samples` samples by source and epoch."""
        self._check(samples)
        before, after = self._drawn(self.start), self._drawn(self.start + samples)
        use: Use = {}
        for dataset, first, last in zip(self.datasets, before, after, strict=True):
            for epoch, rows in split_by_epoch(first, last - first, dataset.rows_per_epoch).items():
                by_epoch = use.setdefault(dataset.shard.source, {})
                by_epoch[epoch] = by_epoch.get(epoch, 0) + rows
        return use

    def readers(self, sources: Mapping[str, TokenSource]) -> list[DocumentOrder]:
        """What to read each dataset's windows from."""
        return [DocumentOrder(dataset, sources[dataset.shard.source]) for dataset in self.datasets]

    def reads_of(self, source: str, start: int, stop: int, samples: int) -> Reads:
        """The samples that hold any of the tokens [start, stop) of a source. Reads the whole index to find them."""
        found: list[tuple[int, int, int]] = []
        for index, dataset in enumerate(self.datasets):
            if dataset.shard.source == source:
                windows = dataset.windows_of(
                    start - dataset.shard.first_token, stop - dataset.shard.first_token
                )
                ordinals = _places(dataset.shuffle, windows)
                for ordinal, sample in zip(ordinals, self._samples_of(index, ordinals), strict=True):
                    epoch = ordinal // dataset.rows_per_epoch
                    found.append((sample - self.start, epoch, int(dataset.shuffle[ordinal])))
        inside = sorted(read for read in found if 0 <= read[0] < samples)
        return Reads(*np.array(inside, np.int64).reshape(-1, 3).T)

    def _samples_of(self, index: int, ordinals: list[int]) -> list[int]:
        """The sample of the old run that is each of these samples of a dataset; -1 where the blend has it not."""
        if self.blend is None:
            return ordinals
        wanted, samples = np.array(ordinals, np.int64), {}
        for begin in range(0, len(self._turns[0]) if len(wanted) else 0, CHUNK):
            dataset, ordinal = (array[begin : begin + CHUNK] for array in self._turns)
            for place in np.flatnonzero((dataset == index) & np.isin(ordinal, wanted)).tolist():
                samples[int(ordinal[place])] = begin + place
        return [samples.get(ordinal, -1) for ordinal in ordinals]

    @lru_cache(maxsize=64)  # noqa: B019  (frozen, and as many as stages)
    def _drawn(self, samples: int) -> tuple[int, ...]:
        """Rows of each dataset among the first `samples` samples of the old run."""
        if self.blend is None:
            return (samples,)
        total = np.zeros(len(self.datasets), np.int64)
        for begin in range(0, samples, CHUNK):
            part = self._turns[0][begin : min(begin + CHUNK, samples)]
            total += np.bincount(part, minlength=len(total))
        return tuple(total.tolist())

    def _check(self, samples: int) -> None:
        if samples > self.samples:
            raise UserError(
                f"the old run's order ends after sample {self.start + self.samples:,}, but the stage reads samples "
                f"{self.start:,} to {self.start + samples:,} of it; make the stage shorter, or go on in our own order "
                "in a stage without megatron_order"
            )


class DocumentOrder:
    """A shard's tokens in the order of a document_index: what `window * seq_length` counts in."""

    packed_length = None  # documents of any source lie end to end here

    def __init__(self, dataset: DatasetIndex, source: TokenSource) -> None:
        self.dataset, self.source = dataset, source
        self.dtype, self.eod_id = source.dtype, source.eod_id

    @cached_property
    def _tables(self) -> tuple[TokenArray, TokenArray]:
        """(byte offset in the shard, tokens) of each document."""
        shard = self.source.shards[self.dataset.shard.number]
        return shard.offsets, shard.lengths

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """The stretches (first token, tokens) of the source that make up [start, start + count) of this order."""
        offsets, lengths = self._tables
        item, order = self.dtype.itemsize, self.dataset.document
        window, skip = divmod(start, self.dataset.seq_length)
        place, offset = (int(entry) for entry in self.dataset.sample[window])
        offset += skip
        while count:
            document = int(order[place]) if place < len(order) else len(lengths)
            if document >= len(lengths):
                raise DataError(
                    f"{self.dataset.stem}-sample_index.npy leads beyond the {len(lengths):,} documents of "
                    f"{self.dataset.shard.path}: these are not the tokens of the old run"
                )
            length = int(lengths[document])
            if offset < length:
                taken = min(count, length - offset)
                yield self.dataset.shard.first_token + int(offsets[document]) // item + offset, taken
                count -= taken
                offset += taken
            if offset >= length:
                place, offset = place + 1, offset - length

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens [start, start + count) of this order, in an array of their own."""
        into = np.empty(count, self.dtype)
        self.read_windows([start], [into])
        return into

    def read_windows(self, starts: Sequence[int], into: Sequence[TokenArray]) -> None:
        """Fill into[i] with the tokens from starts[i] on, all in one go."""
        places: list[int] = []
        parts: list[TokenArray] = []
        for start, row in zip(starts, into, strict=True):
            done = 0
            for place, count in self.pieces(start, row.size):
                places.append(place)
                parts.append(row[done : done + count])
                done += count
        self.source.read_windows(places, parts)


def _places(index: NDArray[Any], wanted: Sequence[int] | NDArray[Any]) -> list[int]:
    """Where an index holds any of some numbers."""
    found: list[int] = []
    for begin in range(0, len(index) if len(wanted) else 0, CHUNK):
        places = np.flatnonzero(np.isin(index[begin : begin + CHUNK], wanted))
        found += (begin + places).tolist()
    return found


def find_blend(
    folder: Path,
    blend: str | None,
    start: int,
    seq_length: int,
    weights: Mapping[str, Fraction],
    paths: Mapping[str, str],
) -> MegatronOrder:
    """Open the cache `folder`. weights: the stage's mixture; paths: of its sources. Refuses what does not fit the stage."""
    stem, description = _description(folder, blend, seq_length)
    described = description.get("datasets", [description])
    shards = _shards(paths)
    datasets = []
    for identity in described:
        # The files of a dataset are named by the hash of the very text of its description.
        text = json.dumps(identity, indent=4)
        name = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        files = folder / f"{name}-{identity['class']}-{identity['index_split']}"
        datasets.append(DatasetIndex(files, _match(str(identity["dataset_path"]), shards), seq_length))
    order = MegatronOrder(tuple(datasets), stem if "datasets" in description else None, start)
    _check_weights(order, description.get("weights", [1]), weights)
    return order


def _description(folder: Path, blend: str | None, seq_length: int) -> tuple[Path, dict[str, Any]]:
    """(stem of the files, what they say of themselves) of the one training blend that fits."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for kind in ("BlendedDataset", "GPTDataset"):
        end = f"-{kind}-train-description.txt"
        for path in sorted(folder.glob(f"{blend or '*'}{end}")):
            try:
                description = json.loads(path.read_text())
                lengths = {one["sequence_length"] for one in description.get("datasets", [description])}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path} is not a description of Megatron's: {error!r}") from None
            if lengths == {seq_length}:
                name = path.name.removesuffix(end)
                found[name] = path.with_name(path.name.removesuffix("-description.txt")), description
        if found:
            break
    if not found:
        which = f" named {blend}" if blend else ""
        raise DataError(
            f"{folder} holds no index of a training run{which} with sequence length {seq_length}: expected "
            "*-BlendedDataset-train-description.txt and the .npy files beside it; give the old run's "
            "--data-cache-path, and its sequence length"
        )
    if len(found) > 1:
        raise UserError(
            f"{folder} holds the index of {len(found)} runs with sequence length {seq_length}; choose one by "
            f"megatron_order.blend: {', '.join(found)}"
        )
    return next(iter(found.values()))


def _shards(paths: Mapping[str, str]) -> list[Shard]:
    shards = []
    for source, path in paths.items():
        where, manifest = locate(path)
        records = (
            [(where / record.prefix, record.tokens) for record in manifest.shards]
            if manifest
            else [(where, tokens_on_disk(where) or 0)]
        )
        first_tokens = accumulate((tokens for _, tokens in records), initial=0)
        for number, ((prefix, tokens), first) in enumerate(zip(records, first_tokens, strict=False)):
            shards.append(Shard(source, number, first, prefix, tokens))
    return shards


def _match(dataset_path: str, shards: Sequence[Shard]) -> Shard:
    """The shard whose path ends most like the old run's, which may have lived in another place."""
    wanted = Path(dataset_path).parts[::-1]

    def alike(shard: Shard) -> int:
        pairs = zip(wanted, shard.path.absolute().parts[::-1], strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(shard.path.parts)))

    best = max(map(alike, shards), default=0)
    likely = [shard for shard in shards if alike(shard) == best]
    if best == 0 or len(likely) > 1:
        why = "no shard has that name" if best == 0 else f"{len(likely)} shards are as likely"
        raise DataError(
            f"the old run read {dataset_path}; {why} among the stage's sources ({', '.join(sorted({s.source for s in shards}))}): "
            "give a source whose .bin and .idx have that name"
        )
    return likely[0]


def _check_weights(order: MegatronOrder, theirs: Sequence[float], ours: Mapping[str, Fraction]) -> None:
    """The mixture of the stage must say what the old run mixed; the rows then come as that run drew them."""
    shares: dict[str, float] = dict.fromkeys(ours, 0.0)
    for name, weight in zip(order.names, theirs, strict=True):
        shares[name] += weight / sum(theirs)
    if any(abs(shares[name] - float(weight)) > WEIGHT_TOLERANCE for name, weight in ours.items()):
        listed = ", ".join(f"{name}: {share:.4g}" for name, share in shares.items())
        raise UserError(f"the old run mixed its sources as {{{listed}}}; write that as the stage's mixture")
