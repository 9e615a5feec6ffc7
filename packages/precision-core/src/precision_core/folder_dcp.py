"""torch.distributed.checkpoint as checkpoint folders use it: flat names, nothing unpickled, nothing live written."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from precision_core.agreement import is_distributed
from precision_core.checkpoint import CheckpointError

_FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def save(tensors: dict[str, Tensor], folder: Path, group: ProcessGroup | None) -> None:
    """Writes the tensors, each rank its shards; raises `OSError` on every rank when one fails."""
    try:
        with _quiet():
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(folder),
                planner=DefaultSavePlanner(**_FLAT),
                process_group=group,
                no_dist=not is_distributed(),
            )
    except CheckpointException as error:  # no Exception; every rank has it
        raise OSError(f"could not write {folder}: {_first(error)}") from error


def load(
    tensors: dict[str, Tensor], fresh: Collection[str], folder: Path, metadata: Metadata, group: ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """Reads into the `fresh` ones of `tensors`, and returns (live, values) for the shards here of all others.

    Raises:
        CheckpointError: on every rank, when one fails.
    """
    planner = _Planner(fresh)
    try:
        with _quiet():
            dcp.load(
                tensors,
                storage_reader=_Reader(folder, metadata),
                planner=planner,
                process_group=group,
                no_dist=not is_distributed(),
            )
    except CheckpointException as error:
        raise CheckpointError(f"the checkpoint {folder} cannot be read: {_first(error)}") from error
    return list(planner.staged.values())


class _Reader(dcp.FileSystemReader):
    """Reads what `metadata` says; torch's would unpickle the file. It loads tensors with weights_only=True itself."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Reads into host memory in place of the live shards."""

    def __init__(self, fresh: Collection[str]) -> None:
        super().__init__(**_FLAT)
        self.fresh = fresh
        self.staged: dict[tuple[str, Any], tuple[Tensor, Tensor]] = {}

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        read: Counter[str] = Counter()
        for item in plan.items:
            read[item.dest_index.fqn] += math.prod(item.lengths)
        for name, tensor in self.state_dict.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if read[name] != local.numel():  # torch would leave what was in the memory
                raise CheckpointError(f"the chunks of {name} have {read[name]} of the {local.numel()} values here")
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        live = super().lookup_tensor(index).detach()
        if index.fqn in self.fresh:
            return live
        place = (index.fqn, index.offset)
        if place not in self.staged:
            self.staged[place] = (live, torch.empty_like(live, device="cpu"))
        return self.staged[place][1]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is bytes, which torch would unpickle")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for text in (".*torch.distributed is disabled, unavailable or uninitialized", "TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", message=text)  # torch's of itself
        yield


def _first(error: CheckpointException) -> str:
    rank, (reason, _) = min(error.failures.items())
    return f"rank {rank}: {type(reason).__name__}: {reason}"
