"""torch.distributed.checkpoint as checkpoint folders use it: flat names, and nothing unpickled."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from precision_core.checkpoint.agreement import is_distributed, losses_told
from precision_core.checkpoint.error import CheckpointError

_FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def save(tensors: dict[str, Tensor], folder: Path, group: ProcessGroup | None) -> None:
    """Writes the tensors, each rank its shards, rank zero what is not sharded.

    Raises:
        OSError: on every rank when one fails.
        CheckpointError: a rank is gone.
    """
    alone = not is_distributed()
    try:
        # No `_quiet` among several: this may run in a thread, and what it sets is the whole process's.
        with losses_told(), _quiet() if alone else nullcontext():
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(folder),
                planner=DefaultSavePlanner(**_FLAT, dedup_save_to_lowest_rank=True),
                process_group=group,
                no_dist=alone,
            )
    except CheckpointException as error:  # no Exception; every rank has it
        raise OSError(f"could not write {folder}: {_first(error)}") from error


def load(tensors: dict[str, Tensor], folder: Path, metadata: Metadata) -> None:
    """Reads into tensors in host memory, into this rank's shards only; no rank waits for another.

    Raises:
        CheckpointError: damaged; `tensors` may hold parts of it.
    """
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=_Reader(folder, metadata), planner=_Planner(**_FLAT), no_dist=True)
    except CheckpointException as error:  # no Exception
        raise CheckpointError(f"the checkpoint {folder} cannot be read: {_first(error)}") from error


class _Reader(dcp.FileSystemReader):
    """Reads what `metadata` says; torch's would unpickle the file. It loads tensors with weights_only=True itself."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Torch's, which would leave what was in the memory where chunks are missing."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        read: Counter[str] = Counter()
        for item in plan.items:
            read[item.dest_index.fqn] += math.prod(item.lengths)
        for name, tensor in self.state_dict.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if read[name] != local.numel():
                raise CheckpointError(f"the chunks of {name} have {read[name]} of the {local.numel()} values here")
        return plan

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
