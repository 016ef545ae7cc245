"""megatron-core's distributed format (torch_dist), read and written tensor by tensor in one process.

Conversion needs weights, not ranks: `StoredWeights` finds a tensor's pieces through `.metadata`, wherever the
tensor-, pipeline- and data-parallel ranks of the run put them, and `write_weights` writes a folder that
`store.load` reads at any layout. Neither builds a model or a process group, and neither holds more than two
tensors. checkpoint/convert.py calls both.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_smol.checkpoint.durable import DurableFile, without_crc32
from megatron_smol.checkpoint.progress import progress
from megatron_smol.checkpoint.safe import check_metadata
from megatron_smol.checkpoint.weights import Shape, Weight, map_name
from megatron_smol.errors import CheckpointError
from megatron_smol.model.emulated_fp8 import AMAX_HISTORY

Read = Callable[[str], Tensor]
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MODEL = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class _Place:
    """Where a weight is: a stored tensor, or one slice of a tensor that stacks all layers."""

    stored: str
    layer: int | None
    shape: Shape
    dtype: torch.dtype


class StoredWeights:
    """The model's weights in a distributed checkpoint, by the names of `weight_map`; optimizer states are not seen."""

    def __init__(self, folder: Path) -> None:
        check_metadata(folder)
        self.folder = folder
        self._metadata: Metadata = FileSystemReader(folder).read_metadata()
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._places: dict[str, _Place] = {}
        for stored, entry in self._metadata.state_dict_metadata.items():
            is_weight = stored.startswith(_MODEL) and not stored.endswith(AMAX_HISTORY)
            if is_weight and isinstance(entry, TensorStorageMetadata):
                self._chunks[stored] = entry.chunks
                self._places |= {map_name(place_name): place for place_name, place in _places(stored, entry)}

    def require(self, weights: Iterable[Weight]) -> None:
        """Refuse a checkpoint whose weights are not exactly these, by name and shape."""
        wanted = {weight.megatron: weight.shape for weight in weights}
        if missing := sorted(wanted.keys() - self._places):
            raise CheckpointError(
                f"{self.folder} lacks weight {missing[0]} ({len(missing)} missing in all) of the model that its "
                "state.json describes; use another checkpoint"
            )
        if unknown := sorted(self._places.keys() - wanted):
            raise CheckpointError(
                f"{self.folder} holds weight {unknown[0]} ({len(unknown)} unknown in all), which the model that "
                "its state.json describes does not have; use another checkpoint"
            )
        for name, shape in wanted.items():
            if (found := self._places[name].shape) != shape:
                raise CheckpointError(
                    f"{self.folder} holds weight {name} of shape {list(found)}, its state.json describes a model "
                    f"with {list(shape)}; use another checkpoint"
                )

    def read(self, name: str) -> Tensor:
        """One weight, whole, with the bits and the dtype it was stored with."""
        place = self._places[name]
        chunks = [
            chunk
            for chunk in self._chunks[place.stored]
            if place.layer is None or chunk.offsets[0] <= place.layer < chunk.offsets[0] + chunk.sizes[0]
        ]
        skip = 0 if place.layer is None else 1  # leading dimension: the layer
        if sum(prod(chunk.sizes[skip:]) for chunk in chunks) != prod(place.shape):
            raise CheckpointError(f"{self.folder}/.metadata does not say where all of {name} is stored")
        whole = torch.empty(place.shape, dtype=place.dtype) if len(chunks) > 1 else None
        for chunk in chunks:
            part = self._read_chunk(place.stored, chunk.offsets)
            if place.layer is not None:
                part = part.view(chunk.sizes)[place.layer - chunk.offsets[0]]
            if whole is None:
                return part.view(place.shape)
            where = zip(chunk.offsets[skip:], chunk.sizes[skip:], strict=True)
            whole[tuple(slice(start, start + size) for start, size in where)] = part
        assert whole is not None
        return whole

    def _read_chunk(self, stored: str, offsets: torch.Size) -> Tensor:
        found = self._metadata.storage_data[MetadataIndex(stored, offsets)]
        path = self.folder / found.relative_path
        if found.transform_descriptors:
            raise CheckpointError(f"{path} is compressed ({found.transform_descriptors}), which is not read")
        try:
            with path.open("rb") as file:
                view: Any = _create_file_view(file, found.offset, found.length)
                tensor: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a handful of kinds for a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read ({reason}); use another checkpoint") from error
        return tensor


def has_optimizer(folder: Path) -> bool:
    """Whether a distributed checkpoint holds more than weights."""
    check_metadata(folder)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return any(name.startswith("optimizer.") for name in stored)


def _places(stored: str, entry: TensorStorageMetadata) -> list[tuple[str, _Place]]:
    """A stored tensor's weights: itself, or a weight a layer when it stacks the layers."""
    shape, dtype = tuple(entry.size), entry.properties.dtype
    if not stored.startswith("decoder.layers.") or _LAYER.fullmatch(stored):
        return [(stored, _Place(stored, None, shape, dtype))]
    inner = stored.removeprefix("decoder.layers.")
    return [
        (f"decoder.layers.{layer}.{inner}", _Place(stored, layer, shape[1:], dtype))
        for layer in range(shape[0])
    ]


# --- writing -----------------------------------------------------------------------------------------------


def write_weights(
    folder: Path, weights: Sequence[Weight], layers: int, dtype: torch.dtype, read: Read
) -> dict[str, dict[str, Any]]:
    """Write `read(weight.megatron)`, cast to `dtype`, of every weight as a distributed checkpoint in `folder`.

    Returns what complete.json is to say of the file with the tensors, which is on the disk by then.
    """
    bar = iter(progress(weights, "writing the checkpoint"))

    def read_next(name: str) -> Tensor:
        next(bar)
        return read(name)

    # One file: its writing is spread over the cores already, and a tensor more would be held.
    writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
    writer.fs = files = _DurableFiles()
    with without_crc32():
        save({}, storage_writer=writer, planner=_OneByOne(weights, layers, dtype, read_next), no_dist=True)
    next(bar, None)  # lets the bar go
    # Not saving.METADATA: megatron-core puts process groups into that one.
    content = {"distrib_optim_sharding_type": "fully_reshardable"}
    torch.save({"content_metadata": content}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return files.described


class _DurableFiles(FileSystem):
    """Where torch's writer puts tensors: files whose checksum is taken as they are written."""

    def __init__(self) -> None:
        self.described: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if not str(path).endswith(DEFAULT_SUFFIX):  # .metadata: small, renamed, summed up with the rest
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with DurableFile(Path(path)) as file:
            yield file
        self.described[Path(path).name] = file.described


class _OneByOne(DefaultSavePlanner):
    """Plans by name and shape alone, and asks for a tensor when it is its turn to be written."""

    def __init__(self, weights: Sequence[Weight], layers: int, dtype: torch.dtype, read: Read) -> None:
        super().__init__()
        self._read, self._dtype = read, dtype
        items = [(weight, _write_item(weight, layers, dtype)) for weight in weights]
        self._weights = {item.index: weight for weight, item in items}
        self._items = [item for _, item in items]

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        assert write_item.tensor_data is not None
        tensor = self._read(self._weights[write_item.index].megatron)
        return tensor.to(self._dtype).contiguous().view(write_item.tensor_data.chunk.sizes)


def _write_item(weight: Weight, layers: int, dtype: torch.dtype) -> WriteItem:
    """megatron-core stacks the layers: [layers, ...], a piece a layer, norms named as Transformer Engine's."""
    name, offsets, sizes, size = weight.megatron, (0,) * len(weight.shape), weight.shape, weight.shape
    if layer := _LAYER.fullmatch(name):
        name = f"decoder.layers.{_STORED_NAMES.get(layer[2], layer[2])}"
        offsets, sizes, size = (int(layer[1]), *offsets), (1, *sizes), (layers, *size)
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(size))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


_STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
