"""The last training forward: what it was given, and what it needs to run once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 1 << 26
"""Bytes up to which a gradient of an output is kept: those of a language model's logits would be its peak of memory."""
_NODES = 256
"""Of a loss's graph that are looked at, nearest first."""


class RandomState:
    """Of the CPU and of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.get_rng_state()
        self.device = device
        self.cuda: Tensor | None = None
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self.cuda = torch.cuda.get_rng_state(device)

    def as_dict(self) -> dict[str, Tensor]:
        """Returns device type -> state."""
        return {"cpu": self.cpu} if self.cuda is None else {"cpu": self.cpu, "cuda": self.cuda}

    def restore(self) -> None:
        """Sets the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class Batch:
    """Of one forward of the model. Nothing is copied: where the loop writes its inputs anew, they are the new ones."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, model: nn.Module) -> None:
        self.args, self.kwargs, self.model = args, kwargs, model
        self.random = RandomState(device)
        self.autocast = {
            each: torch.get_autocast_dtype(each) if torch.is_autocast_enabled(each) else None
            for each in {"cpu", device.type}
            if torch.amp.is_autocast_available(each)
        }
        self.cache = torch.is_autocast_cache_enabled()
        self.gradients: list[Tensor | None] = []  # of the outputs that are tensors, in order
        self.too_large = False  # whether a gradient was not kept
        self.loss: Tensor | None = None

    def follow(self, outputs: Any, insides: dict[int, list[int]]) -> None:
        """Keeps the gradient that will reach each tensor of the outputs; `insides` remembers the run's `_inside`."""
        leaves = torch.utils._pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) not in insides:
            insides[len(tensors)] = _inside(tensors)
        self.gradients = [None] * len(tensors)
        for number, tensor in enumerate(tensors):
            if tensor.requires_grad and number not in insides[len(tensors)]:
                tensor.register_hook(lambda gradient, number=number: self._keep(number, gradient))

    def _keep(self, number: int, gradient: Tensor) -> None:
        if gradient.numel() * gradient.element_size() <= LARGEST:
            self.gradients[number] = gradient.detach()
        else:
            self.too_large = True

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context with the autocast that the forward ran in."""
        with ExitStack() as stack:
            for device, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype, dtype is not None, self.cache))
            yield


def _inside(tensors: list[Tensor]) -> list[int]:
    """Returns which of the outputs another output was computed from: logits, where the model gives its loss, too.

    The gradient that reaches them comes through the other one, and would be counted twice.
    """
    found = []
    for number, tensor in enumerate(tensors):
        others = [
            each.grad_fn for each in tensors if each is not tensor and each.grad_fn is not None and not each.dim()
        ]
        if tensor.dim() and tensor.grad_fn is not None and any(_reaches(each, tensor.grad_fn) for each in others):
            found.append(number)
    return found


def _reaches(start: Any, end: Any) -> bool:
    waiting, seen = [start], {start}
    while waiting and len(seen) < _NODES:
        node = waiting.pop(0)
        if node is end:
            return True
        for each, _ in node.next_functions:
            if each is not None and each not in seen:
                seen.add(each)
                waiting.append(each)
    return False
