"""Where the tensors of a checkpoint folder are: `chunks.json`, the content of the pickled `.metadata` as plain values.

{"model.weight": {"dtype": "torch.half", "shape": [8, 3], "chunks": [[file, start, length, offsets, sizes], ...]}}
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from precision_core.checkpoint.error import CheckpointError

CHUNKS = "chunks.json"


class Chunk(NamedTuple):
    """A part of a tensor (offsets and sizes by dimension), and the bytes of a file that hold its `torch.save`."""

    file: str
    start: int
    length: int
    offsets: list[int]
    sizes: list[int]


def dumps(metadata: Metadata) -> bytes:
    """Returns `chunks.json` for the metadata that `dcp.save` returned; chunks without elements are left out."""
    table: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        chunks = []
        for chunk in (chunk for chunk in entry.chunks if math.prod(chunk.sizes)):  # type: ignore[union-attr]
            found = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            chunks.append([found.relative_path, found.offset, found.length, chunk.offsets, chunk.sizes])
        table[name] = {"dtype": str(entry.properties.dtype), "shape": entry.size, "chunks": chunks}  # type: ignore[union-attr]
    return json.dumps(table).encode()


def loads(data: bytes, tensors: Mapping[str, Tensor], files: Mapping[str, int]) -> dict[str, list[Chunk]]:
    """Returns the chunks of each of `tensors`: they cover every element once, within `files` (name -> size in bytes).

    Raises:
        CheckpointError: other tensors, shapes or dtypes, invalid or overlapping chunks; names the tensor.
    """
    chunks: dict[str, list[Chunk]] = {}
    try:
        table = json.loads(data)
        if table.keys() != tensors.keys():
            raise CheckpointError(
                f"{CHUNKS}: other tensors than expected: {sorted(table.keys() ^ tensors.keys())[:10]}"
            )
        for name, tensor in tensors.items():
            if (table[name]["dtype"], table[name]["shape"]) != (str(tensor.dtype), list(tensor.shape)):
                raise CheckpointError(f"{CHUNKS}: another shape or dtype for tensor {name}")
            chunks[name] = [Chunk(*chunk) for chunk in table[name]["chunks"]]
            for chunk in chunks[name]:
                _check(name, tensor, chunk, files)
            if not _is_tiled(tensor, chunks[name]):
                raise CheckpointError(f"{CHUNKS}: chunks of tensor {name} overlap, or miss elements")
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{CHUNKS} is invalid: {type(error).__name__}: {error}") from error
    return chunks


def _check(name: str, tensor: Tensor, chunk: Chunk, files: Mapping[str, int]) -> None:
    """Raises `CheckpointError` unless the chunk is within the tensor, in a file with bytes for all of it."""
    file, start, length, offsets, sizes = chunk
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    integers = all(type(number) is int for number in (start, length, *offsets, *sizes))
    if not integers or len(ends) != tensor.dim() or min([1, *sizes]) < 1 or min([0, *offsets]) < 0:
        raise CheckpointError(f"{CHUNKS}: invalid chunk for tensor {name}: {str(chunk)[:200]}")
    if any(end > size for end, size in zip(ends, tensor.shape, strict=True)):
        raise CheckpointError(f"{CHUNKS}: chunk outside of tensor {name} of shape {tuple(tensor.shape)}")
    if not 0 <= start <= start + length <= files.get(file, -1):
        raise CheckpointError(f"{CHUNKS}: chunk of tensor {name} outside of the checkpoint's files")
    if math.prod(sizes) * tensor.itemsize > length:
        raise CheckpointError(
            f"{CHUNKS}: {length} bytes are too few for a chunk of tensor {name} of shape {tuple(sizes)}"
        )


def _is_tiled(tensor: Tensor, chunks: list[Chunk]) -> bool:
    """Whether the chunks form a grid (as shards along dimensions do) that covers every element once."""
    cuts = [sorted({0, size, *(chunk.offsets[dim] for chunk in chunks)}) for dim, size in enumerate(tensor.shape)]
    next_cut = [dict(itertools.pairwise(each)) for each in cuts]
    for chunk in chunks:
        if any(next_cut[dim][offset] != offset + chunk.sizes[dim] for dim, offset in enumerate(chunk.offsets)):
            return False
    return len({tuple(chunk.offsets) for chunk in chunks}) == len(chunks) == math.prod(map(len, next_cut))
