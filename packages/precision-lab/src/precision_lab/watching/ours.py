"""Which optimizers train the watched models."""

from __future__ import annotations

import weakref

from torch import nn
from torch.optim import Optimizer


class Ours:
    """Those that the user gave, what they wrap, and all that hold a parameter of the models."""

    def __init__(self, models: list[nn.Module], optimizers: list[Optimizer]) -> None:
        self._models, self._given = models, optimizers
        self._known: dict[int, tuple[weakref.ref[Optimizer], bool]] = {}

    def __contains__(self, optimizer: Optimizer) -> bool:
        known = self._known.get(id(optimizer))
        if known is None or known[0]() is not optimizer:
            known = self._known[id(optimizer)] = weakref.ref(optimizer), self._decide(optimizer)
        return known[1]

    def _decide(self, optimizer: Optimizer) -> bool:
        if any(optimizer is each or getattr(each, "optimizer", None) is optimizer for each in self._given):
            return True
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        return any(id(param) in held for model in self._models for param in model.parameters())
