"""Group: the processes of a run, and the collectives over them (gather, reduce, broadcast, barrier)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from precision_core.policy.casting import map_tensors
from precision_core.policy.messages import nearest
from precision_core.strategies.processes import Ranks
from precision_core.strategies.transfer import pack, unpack

T = TypeVar("T")

_OPERATIONS = {
    "mean": dist.ReduceOp.SUM,  # and divided afterwards: gloo has no mean
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
_TORCHS = (dist.ReduceOp, dist.ReduceOp.RedOpType)


def operation_name(op: Any, argument: str = "op") -> str:
    """Returns "mean", "sum", "min" or "max" for that name, "avg", or torch's `ReduceOp`; `ValueError` for another."""
    name = str(op).removeprefix("RedOpType.").lower() if isinstance(op, _TORCHS) else op
    name = "mean" if name == "avg" else name
    if name not in _OPERATIONS:
        hint = nearest(str(name), _OPERATIONS)
        raise ValueError(f"all_reduce({argument}={op!r}): allowed are {', '.join(_OPERATIONS)}{hint}")
    return str(name)


class Group:
    """Collectives over tensors in any nesting of containers, in a run of one process."""

    rank = 0
    """This process's number among all processes of the run."""
    local_rank = 0
    """This process's number on its machine."""
    world_size = 1
    """How many processes run."""
    local_world_size = 1
    """How many of them run on this machine."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process is here."""

    def all_gather(self, data: T) -> T:
        """Returns `data` with each tensor as (world_size, *shape), those of all ranks; their shapes must be equal."""
        return map_tensors(data, lambda tensor: tensor.detach().unsqueeze(0))

    def all_reduce(self, data: T, op: str = "mean") -> T:
        """Returns `data` with each tensor replaced by its mean, sum, min or max over all ranks, in its own dtype.

        Raises:
            ValueError: another operation.
        """
        operation_name(op)
        return map_tensors(data, lambda tensor: tensor.detach() / 1 if op == "mean" else tensor.detach().clone())

    def broadcast(self, data: T, src: int = 0) -> T:
        """Returns rank `src`'s `data`, any object that pickles; its tensors arrive on this rank's device.

        Those in containers, and of those in custom objects the ones that were on rank `src`'s device; the others stay
        in CPU memory.
        """
        return data


class TorchGroup(Group):
    """Collectives over torch.distributed's default group, one process a device."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.rank, self.local_rank = ranks.rank, ranks.local_rank
        self.world_size, self.local_world_size = ranks.world_size, ranks.local_world_size
        self._device = device

    def barrier(self) -> None:
        dist.barrier()

    def all_gather(self, data: T) -> T:
        def gather(tensor: Tensor) -> Tensor:
            sent = tensor.detach().to(self._device).contiguous()
            parts = [torch.empty_like(sent) for _ in range(self.world_size)]
            dist.all_gather(parts, sent)
            return torch.stack(parts).to(tensor.device)

        return map_tensors(data, gather)

    def all_reduce(self, data: T, op: str = "mean") -> T:
        how = _OPERATIONS[operation_name(op)]

        def reduce(tensor: Tensor) -> Tensor:
            sent = tensor.detach().to(self._device, copy=True).contiguous()
            dist.all_reduce(sent, how)
            if op == "mean":
                sent = sent / self.world_size  # of integers, too: torch.mean refuses them, and truncating would lie
            return sent.to(tensor.device)

        return map_tensors(data, reduce)

    def broadcast(self, data: T, src: int = 0) -> T:
        # in CPU memory: as they are, each rank would unpickle them on the device of rank `src` first
        sends = self.rank == src
        box: list[Any] = [None]
        if sends:
            box = [pack(map_tensors(data, lambda tensor: tensor.to("cpu")), self._device)]
        dist.broadcast_object_list(box, src=src, device=self._device)
        return map_tensors(data if sends else unpack(box[0], self._device), lambda tensor: tensor.to(self._device))
