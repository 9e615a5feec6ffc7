"""Checks that all ranks' backwards give gradients to the same parameters, in the same order.

From stage 2 on DeepSpeed reduces gradients in the order in which a rank computes them, in one flat tensor; at stage 3
it gathers parameters in the order in which a rank needs them. Ranks that use different parts of the model would add up
gradients, and gather values, of different parameters, without an error (0.19.8). If stage 3 has traced an earlier step,
ranks may also wait for each other in its gathers, before the check: the group's timeout ends that.

An all-reduce for the check in each step made a small model's step up to a tenth longer (gloo, two ranks). So there is
one only if a rank's order is not the one that all agreed on last: that rank asks for it by making the norm of the
gradients NaN, which DeepSpeed reduces before it steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from precision_deepspeed import vendor

T = TypeVar("T")


class Order:
    """Records in which order the parameters of `module` get gradients; ranks compare that before a step."""

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        self._device = device
        self._agreed: int | None = None
        self._recorded = 0
        self._compared = False
        params = [param for param in module.parameters() if param.requires_grad]
        self._hooks = [
            param.register_post_accumulate_grad_hook(functools.partial(self._record, number))
            for number, param in enumerate(params, start=1)
        ]

    def _record(self, number: int, param: Tensor) -> None:
        self._recorded = (self._recorded * 1_000_003 + number) % (2**61 - 1)

    def forget(self) -> None:
        """Starts a new record, as after a step."""
        self._recorded = 0
        self._compared = False

    def check(self) -> None:
        """Raises `RuntimeError` on all ranks if their orders since the last step differ."""
        both = torch.tensor([self._recorded, -self._recorded], dtype=torch.int64, device=self._device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        largest, smallest = both.tolist()
        if largest != -smallest:
            raise RuntimeError(
                "ranks gave gradients to different parameters, or in another order, since the last step: from stage 2 "
                "on DeepSpeed would add them up across parameters. Let every rank use all of the model (add "
                "0 * part(x).sum() to the loss), or pass stage=0 or 1; optimizer.zero_grad() discards these gradients"
                " [ranks-differ]"
            )
        self._agreed, self._compared = self._recorded, True

    def checked_by(self, norm: Callable[..., T]) -> Callable[..., T]:
        """Returns `norm`, a function of DeepSpeed's that reduces one number over ranks, with the check added to it."""

        @functools.wraps(norm)
        def checking(*args: Any, **kwargs: Any) -> T:
            if self._compared:
                return norm(*args, **kwargs)
            with vendor.all_reduce_replaced(self._reduce):
                result = norm(*args, **kwargs)
            if not self._compared:
                self.check()
            return result

        return checking

    def _reduce(self, all_reduce: Callable[..., Any], tensor: Tensor, op: Any, group: Any) -> None:
        """Reduces `tensor`; if that sums a scalar over all ranks and one of them asks for it, all check first."""
        of_all = torch.distributed.get_world_size(group) == torch.distributed.get_world_size()
        if self._compared or op.name != "SUM" or not of_all or tensor.numel() != 1:
            all_reduce(tensor, op=op, group=group)
            return
        mine = tensor.clone()
        if self._recorded != self._agreed:
            tensor.fill_(math.nan)
        all_reduce(tensor, op=op, group=group)
        if tensor.isnan().item():  # on all ranks
            self.check()
            all_reduce(tensor.copy_(mine), op=op, group=group)
        self._compared = True

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
