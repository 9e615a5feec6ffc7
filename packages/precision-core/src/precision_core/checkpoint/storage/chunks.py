"""The `.metadata` file of torch.distributed.checkpoint: read without executing it, and checked before it is used.

It says of each tensor its shape, dtype and chunks, and of each chunk the file, offset and length. torch reads it with
plain pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage import safe_pickle
from precision_core.checkpoint.storage.safe_pickle import Call, Record

_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_PATH = Call(lambda *parts: "/".join(parts))  # where it was written: nobody opens it
_MODULE = "torch.distributed.checkpoint.metadata"

ALLOWED: dict[str, Any] = {
    # Looked up in what torch 2.9 and 2.13 write on Python 3.10 to 3.13.
    f"{_MODULE}.Metadata": Record(
        Metadata,
        {
            "state_dict_metadata": (dict,),
            "planner_data": (dict, NoneType),
            "storage_data": (dict,),
            "storage_meta": (StorageMeta, NoneType),
            "version": (str, NoneType),
        },
    ),
    f"{_MODULE}.TensorStorageMetadata": Record(
        TensorStorageMetadata, {"properties": (TensorProperties,), "size": (torch.Size,), "chunks": (list,)}
    ),
    f"{_MODULE}.TensorProperties": Record(
        TensorProperties,
        {
            "dtype": (torch.dtype,),
            "layout": (torch.layout,),
            "requires_grad": (bool,),
            "memory_format": (torch.memory_format,),
            "pin_memory": (bool,),
        },
    ),
    f"{_MODULE}.ChunkStorageMetadata": Record(ChunkStorageMetadata, {"offsets": (torch.Size,), "sizes": (torch.Size,)}),
    f"{_MODULE}.BytesStorageMetadata": Record(BytesStorageMetadata, {}),
    f"{_MODULE}.MetadataIndex": Record(
        MetadataIndex, {"fqn": (str,), "offset": (torch.Size, NoneType), "index": (int, NoneType)}
    ),
    f"{_MODULE}.StorageMeta": Record(
        StorageMeta,
        {
            "checkpoint_id": (str, NoneType),
            "save_id": (str, NoneType),
            "load_id": (str, NoneType),
            "modules": (list,),
        },
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo": Record(
        _StorageInfo, {"relative_path": (str,), "offset": (int,), "length": (int,), "transform_descriptors": (list,)}
    ),
    f"{_MODULE}._MEM_FORMAT_ENCODING": Call(lambda number: _MEMORY_FORMATS[number]),
    "torch.Size": Call(torch.Size),
    "torch.serialization._get_layout": Call(lambda name: torch.strided if name == "torch.strided" else None),
    "pathlib.PosixPath": _PATH,
    "pathlib.WindowsPath": _PATH,
    "pathlib._local.PosixPath": _PATH,  # Python 3.13
    "pathlib._local.WindowsPath": _PATH,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


def parse(data: bytes, *, trust: bool = False) -> Metadata:
    """Returns what the bytes of a `.metadata` file hold; `trust` executes whatever they say.

    Raises:
        CheckpointError: anything in it that such a file does not need; nothing was executed.
    """
    metadata = safe_pickle.loads(data, ALLOWED, trust=trust)
    if type(metadata) is not Metadata:
        raise CheckpointError(f"a {type(metadata).__name__} is not what .metadata holds")
    return metadata


def check(metadata: Metadata, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Raises `CheckpointError` unless `metadata` has exactly `tensors`, in the files of `sizes` (name -> bytes).

    A path such as "../x" is in no such list.
    """
    entries = metadata.state_dict_metadata
    if entries.keys() != tensors.keys():
        raise CheckpointError(f".metadata has other tensors: {sorted(map(str, entries.keys() ^ tensors.keys()))[:10]}")
    for name, tensor in tensors.items():
        entry = entries[name]
        if type(entry) is not TensorStorageMetadata:
            raise CheckpointError(f".metadata has bytes for the tensor {name}, which nobody opens")
        if (entry.size, entry.properties.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f".metadata has another shape or dtype for {name}")
        for chunk in entry.chunks:
            if type(chunk) is not ChunkStorageMetadata or not len(chunk.offsets) == len(chunk.sizes) == tensor.dim():
                raise CheckpointError(f".metadata has a chunk of {name} that is none")
    for index, info in (metadata.storage_data or {}).items():
        if type(index) is not MetadataIndex or type(info) is not _StorageInfo or info.transform_descriptors:
            raise CheckpointError(".metadata has a storage entry that is none")
        if not 0 <= info.offset <= info.offset + info.length <= sizes.get(info.relative_path, -1):
            raise CheckpointError(f".metadata puts {index.fqn} outside of the files that belong to it")
