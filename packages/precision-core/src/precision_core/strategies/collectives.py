"""Collectives: what a script does over all processes, with tensors in any nesting of containers."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from precision_core.policy.casting import map_tensors
from precision_core.policy.messages import nearest
from precision_core.strategies.processes import Ranks

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


def reduce_op(op: str) -> Any:
    """Returns torch's operation for "mean", "sum", "min" or "max"; raises `ValueError` for another."""
    return _OPERATIONS[operation_name(op)]


class Collectives:
    """The collectives of torch.distributed's default group, for strategies with one process a device."""

    device: torch.device
    ranks: Ranks

    @property
    def global_rank(self) -> int:
        """This process's number among all processes of the run."""
        return self.ranks.rank

    @property
    def local_rank(self) -> int:
        """This process's number on its node."""
        return self.ranks.local_rank

    @property
    def world_size(self) -> int:
        """How many processes run."""
        return self.ranks.world_size

    def barrier(self) -> None:
        """Waits until every process is here."""
        dist.barrier()

    def all_gather(self, data: T) -> T:
        """Returns `data` with each tensor as (world_size, *shape): those of all ranks, which must be of one shape."""

        def gather(tensor: Tensor) -> Tensor:
            sent = tensor.detach().to(self.device).contiguous()
            parts = [torch.empty_like(sent) for _ in range(self.world_size)]
            dist.all_gather(parts, sent)
            return torch.stack(parts).to(tensor.device)

        return map_tensors(data, gather)

    def all_reduce(self, data: T, op: str = "mean") -> T:
        """Returns `data` with each tensor replaced by its mean, sum, min or max over all ranks, in its own dtype."""
        how = reduce_op(op)

        def reduce(tensor: Tensor) -> Tensor:
            sent = tensor.detach().to(self.device, copy=True).contiguous()
            dist.all_reduce(sent, how)
            if op == "mean":
                sent = sent / self.world_size  # of integers, too: torch.mean refuses them, and truncating would lie
            return sent.to(tensor.device)

        return map_tensors(data, reduce)

    def broadcast(self, data: T, src: int = 0) -> T:
        """Returns rank `src`'s `data`, any object that pickles; its tensors arrive on this rank's device."""
        box: list[Any] = [data]
        dist.broadcast_object_list(box, src=src, device=self.device)
        return map_tensors(box[0], lambda tensor: tensor.to(self.device))
