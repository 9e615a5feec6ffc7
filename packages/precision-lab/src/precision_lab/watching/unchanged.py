"""Updates that round to nothing, of some elements of each half parameter of one optimizer's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_lab.auditing.sample import local
from precision_lab.auditing.stored import MASTERS

_ELEMENTS = 256
_HALVES = (torch.bfloat16, torch.float16)


class Unchanged:
    """Taken before a step. A parameter of which the optimizer keeps a more exact value is left out."""

    def __init__(self, optimizer: Optimizer, name_of: Callable[[Tensor], str | None]) -> None:
        self._taken: list[tuple[str, Tensor, Tensor, Tensor]] = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None or param.dtype not in _HALVES or not float(group.get("lr", 1.0)):
                    continue
                name = name_of(param)
                if name is None or any(key in optimizer.state.get(param, {}) for key in MASTERS):
                    continue
                value, gradient = local(param.detach()), local(param.grad)
                if value.is_contiguous() and gradient.is_contiguous() and value.numel():
                    here = slice(0, None, max(value.numel() // _ELEMENTS, 1))
                    part = value.view(-1)[here]
                    self._taken.append((name, part, part.clone(), gradient.view(-1)[here] != 0))

    def counts(self) -> tuple[list[str], Tensor | None]:
        """Called after the step: names, and for each (elements that stayed as they were, elements with a gradient)."""
        if not self._taken:
            return [], None
        counts = [torch.stack([((part == old) & moved).sum(), moved.sum()]) for _, part, old, moved in self._taken]
        return [name for name, *_ in self._taken], torch.stack(counts)
