"""safetensors files written in place, tensor by tensor: memory holds one tensor, whatever the size of a file.

safetensors' own `save_file` wants all tensors of a file at once. The format is a JSON header and the tensors
back to back (huggingface/safetensors, README "Format"), so a file can be laid out first and filled in any
order; the bytes are those that `save_file` writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from megatron_smol.checkpoint.weights import Shape
from megatron_smol.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_SIZE = "50GB"  # transformers 5's default
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Put(Protocol):
    """Writes one tensor to its place; dtype and shape are those that were announced."""

    def __call__(self, name: str, tensor: Tensor) -> None: ...


@contextmanager
def shards(
    folder: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, max_shard_size: str = SHARD_SIZE
) -> Iterator[Put]:
    """Lay out `folder`'s safetensors (and their index, if several) and yield what fills them.

    max_shard_size: such as "5GB"; a tensor larger than that has a file of its own. OSError when the disk is full.
    """
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    try:
        plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(
            f"--max-shard-size {max_shard_size} is not a size; write it as 5GB or 500MB"
        ) from error
    places: dict[str, tuple[Any, int]] = {}
    with ExitStack() as files:
        for file_name, names in plan.filename_to_tensors.items():
            header, offsets, size = _layout({name: shapes[name] for name in names}, dtype)
            file = files.enter_context((folder / file_name).open("wb"))
            file.write(header)
            file.truncate(size)
            places |= {name: (file, offset) for name, offset in offsets.items()}

        def put(name: str, tensor: Tensor) -> None:
            file, offset = places.pop(name)
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shapes[name])
            file.seek(offset)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

        yield put
        assert not places, f"never written: {sorted(places)[:3]}"
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _layout(shapes: Mapping[str, Shape], dtype: torch.dtype) -> tuple[bytes, dict[str, int], int]:
    """(header with its length in front, offset of each tensor in the file, size of the file)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + entries[name]["data_offsets"][0] for name in shapes}
    return header, offsets, len(header) + end
