"""The tensors of a checkpoint folder: written by torch.distributed.checkpoint, read without unpickling."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.utils import _create_file_view

from precision_core.checkpoint.agreement import is_distributed, peer_failure_as_error
from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.shards import local_part
from precision_core.checkpoint.storage.chunks import Chunk


def save(tensors: dict[str, Tensor], folder: Path, group: ProcessGroup | None) -> Metadata:
    """Writes the tensors: each rank its shards, rank zero what is not sharded; returns, on each rank, where they are.

    Raises:
        OSError: on every rank when one fails.
        CheckpointError: a rank died or cannot be reached.
    """
    alone = not is_distributed()
    try:
        # No `_quiet` among several: this may run in a thread, and what it sets is the whole process's.
        with peer_failure_as_error(), _quiet() if alone else nullcontext():
            return dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(folder),
                planner=DefaultSavePlanner(
                    flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
                ),
                process_group=group,
                no_dist=alone,
            )
    except CheckpointException as error:  # a BaseException, raised on every rank
        rank, (reason, _) = min(error.failures.items())
        raise OSError(f"could not write {folder}: rank {rank}: {type(reason).__name__}: {reason}") from error


def load(tensors: dict[str, Tensor], folder: Path, chunks: Mapping[str, list[Chunk]]) -> None:
    """Reads values into `tensors`, in CPU memory: of DTensors this rank's shards. No rank waits for another.

    Raises:
        CheckpointError: damaged; `tensors` may hold some of its values then.
    """
    for name, tensor in tensors.items():
        local, start = local_part(tensor)
        for chunk in chunks[name]:
            lows = [max(pair) for pair in zip(start, chunk.offsets, strict=True)]
            ends = zip(start, local.shape, chunk.offsets, chunk.sizes, strict=True)
            sizes = [min(a + m, b + n) - low for low, (a, m, b, n) in zip(lows, ends, strict=True)]
            if min([1, *sizes]) < 1:
                continue
            into, saved = local, _read(folder, name, chunk, tensor.dtype)
            for dim, (low, size) in enumerate(zip(lows, sizes, strict=True)):
                into = into.narrow(dim, low - start[dim], size)
                saved = saved.narrow(dim, low - chunk.offsets[dim], size)
            into.copy_(saved)


def _read(folder: Path, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    try:
        with open(folder / chunk.file, "rb") as file:
            view: Any = _create_file_view(file, chunk.start, chunk.length)
            saved = torch.load(view, "cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(f"{name} of {folder} cannot be read: {type(error).__name__}: {reason}") from error
    is_plain = isinstance(saved, Tensor) and saved.layout is torch.strided and not saved.is_meta
    if not is_plain or (list(saved.shape), saved.dtype) != (chunk.sizes, dtype):
        raise CheckpointError(f"{name} of {folder} cannot be read: not a tensor of {chunk.sizes} in {dtype}")
    return saved


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for text in (".*torch.distributed is disabled, unavailable or uninitialized", "TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", message=text)  # torch warns of its own calls
        yield
