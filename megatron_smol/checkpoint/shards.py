"""safetensors files written tensor by tensor: memory holds one tensor, whatever the size of a file.

safetensors' own `save_file` wants all tensors of a file at once. The format is a JSON header and the tensors
back to back (huggingface/safetensors, README "Format"), so the header is made from the shapes and the tensors
follow as they are read; the bytes are those that `save_file` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from megatron_smol.checkpoint.durable import DurableFile
from megatron_smol.checkpoint.weights import Shape
from megatron_smol.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_SIZE = "50GB"  # transformers 5's default
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def write_shards(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write `folder`'s safetensors (and their index, if several), each on the disk before the next is begun.

    get: gives a tensor of the announced shape and of `dtype`; it is asked once for each, in the order of the files.
    max_shard_size: such as "5GB"; a tensor larger than that has a file of its own. OSError when the disk is full.
    """
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    try:
        plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(
            f"--max-shard-size {max_shard_size} is not a size; write it as 5GB or 500MB"
        ) from error
    for file_name, names in plan.filename_to_tensors.items():
        with DurableFile(folder / file_name) as file:
            file.write(_header({name: shapes[name] for name in names}, dtype))
            for name in sorted(names):
                tensor = get(name)
                assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shapes[name])
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    """The header with its length in front; the tensors follow in the order of their names."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file. dtype: safetensors' name of it."""

    file: Path
    offset: int
    shape: Shape
    dtype: str

    def read(self) -> Tensor:
        """A copy in memory of its own: a view of the mapped file would begin at any address, and its pages would
        count as memory for as long as anything of that file is in use."""
        tensor = torch.empty(self.shape, dtype=TORCH_DTYPES[self.dtype])
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            rest = tensor.flatten().view(torch.uint8).numpy().data
            while len(rest):
                got = file.readinto(rest)
                if not got:
                    raise OSError(f"ends {len(rest):,} bytes before its last tensor")
                rest = rest[got:]
        return tensor


def places(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file is. SafetensorError or OSError when the library refuses the file."""
    with safe_open(path, framework="pt"):  # checks the header, and that the file has every byte of it
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Place(path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }
