"""A few small gradients that each step is judged by where the loop computes no norm.

What backward makes NaN reaches all parameters before that place: those that come first tell of it at next to no cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

PARAMETERS, ELEMENTS = 4, 4_096
"""How many of an optimizer's first parameters are looked at, and how large they are at most."""


class Probes:
    """The parameters of each optimizer that are looked at."""

    def __init__(self) -> None:
        self._params: dict[int, list[Tensor]] = {}

    def largest(self, optimizer: Optimizer) -> Tensor | None:
        """Returns the sum of the largest absolute gradients, which is not finite where one is not; None without."""
        params = self._params.get(id(optimizer))
        if params is None:
            every = (param for group in optimizer.param_groups for param in group["params"])
            small = [each for each in every if each.requires_grad and each.numel() <= ELEMENTS]
            params = self._params[id(optimizer)] = small[:PARAMETERS]
        gradients = [each.grad for each in params if type(each.grad) is Tensor and each.grad.layout is torch.strided]
        gradients = [each for each in gradients if each.numel()]
        if not gradients or any(each.device != gradients[0].device for each in gradients):
            return None
        found = torch._foreach_norm(gradients, math.inf)
        return found[0] if len(found) == 1 else torch.stack([each.float() for each in found]).sum()
