"""Updates that round to nothing, of some elements of each half parameter of one optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_lab.auditing.sample import local
from precision_lab.auditing.stored import MASTERS
from precision_lab.explaining.before import Before, Param

_ELEMENTS = 256
_HALVES = (torch.bfloat16, torch.float16)


class Unchanged:
    """Taken before a step. A parameter of which the optimizer keeps a more exact value is left out."""

    def __init__(self, optimizer: Optimizer, name_of: Callable[[Tensor], str | None], details: bool = False) -> None:
        self._taken: list[tuple[str, Tensor, Tensor, Tensor]] = []
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        self.before = Before(optimizer, [], options)  # of the same elements, where details are asked for
        for number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.grad is None or param.dtype not in _HALVES or not float(group.get("lr", 1.0)):
                    continue
                name = name_of(param)
                if name is None or any(map(_is_exact, optimizer.state.get(param, {}))):
                    continue
                value, gradient = local(param.detach()), local(param.grad)
                if value.is_contiguous() and gradient.is_contiguous() and value.numel():
                    here = slice(0, None, max(value.numel() // _ELEMENTS, 1))
                    part = value.view(-1)[here]
                    old, slope = part.clone(), gradient.view(-1)[here]
                    self._taken.append((name, part, old, slope != 0))
                    if details:
                        state = {key: _part(each, param, here) for key, each in optimizer.state.get(param, {}).items()}
                        self.before.params.append(Param(name, param, old, slope.clone(), state, number))

    def counts(self) -> tuple[list[str], Tensor | None]:
        """Called after the step: names, and for each (elements that stayed as they were, elements with a gradient)."""
        if not self._taken:
            return [], None
        for each, (_, part, _, _) in zip(self.before.params, self._taken, strict=False):
            each.live = part.clone()
        counts = [torch.stack([((part == old) & moved).sum(), moved.sum()]) for _, part, old, moved in self._taken]
        return [name for name, *_ in self._taken], torch.stack(counts)


def _is_exact(key: str) -> bool:
    """Whether a state by this name holds what is cut off of a parameter."""
    return key in MASTERS or "kahan" in key or "compensation" in key


def _part(value: Any, param: Tensor, here: slice) -> Any:
    """Returns of an optimizer's state what belongs to the sampled elements; what is of all of them as it is."""
    if not isinstance(value, Tensor):
        return value
    value = local(value.detach())
    return (value.reshape(-1)[here] if value.shape == local(param).shape else value).clone()
