"""No code from a checkpoint is ever run.

megatron-core 0.16.1 reads `.metadata` with a bare `pickle.load`, and its planner unpickles sharded objects
without restriction: a crafted checkpoint executes. We write tensors only, so everything else is refused
before megatron-core sees it: the metadata may name nothing but these classes, and no entry may be bytes.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from megatron_smol.errors import CheckpointError

_ALLOWED = {
    "builtins": {"set", "frozenset", "slice"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "strided"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"names {module}.{name}, which no checkpoint of ours contains")


def check_metadata(folder: Path) -> None:
    """Refuse a distributed checkpoint whose metadata could run code or asks for objects to be unpickled."""
    path = folder / ".metadata"
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}: it is damaged or hostile, and was not loaded") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    for key, entry in metadata.state_dict_metadata.items():
        if type(entry).__name__ != "TensorStorageMetadata":
            raise CheckpointError(
                f"{path} holds '{key}' as {type(entry).__name__}; only tensors are loaded, and nothing was"
            )
