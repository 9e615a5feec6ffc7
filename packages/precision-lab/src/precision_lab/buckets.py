"""The buckets of torch's DDP, in a trace of one device: its reducer is C++ that reads values, and cannot be traced.

DDP keeps a second copy of all gradients in buckets, the first of 1 MiB, the others of 25. Where the mode averages in
another dtype than gradients have, each bucket that is on its way is there in that dtype besides: two are counted. Where
gradients are wider than parameters, all of what was sent is there until DDP has made gradients of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from precision_core import Policy

FIRST, OTHERS = 2**20, 25 * 2**20
"""Bytes at which DDP begins another bucket: `dist._DEFAULT_FIRST_BUCKET_BYTES`, and its `bucket_cap_mb`."""


class Buckets:
    """What DDP allocates beside a model's own gradients; made after set-up, and asked after each backward."""

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self._policy = policy
        self._trained = [param for param in model.parameters() if param.requires_grad]
        self.tensors = [torch.empty(size, dtype=dtype) for size, dtype in _assigned(reversed(self._trained))]

    def reduce(self) -> None:
        """Allocates what averaging does, and gives wide gradients their dtype."""
        policy = self._policy
        half = [bucket for bucket in self.tensors if bucket.dtype is policy.params]
        if policy.grads is not policy.params:
            sent = [bucket.to(policy.grads) for bucket in half]
            for param in self._trained:
                if param.dtype is policy.params and param.grad is not None:
                    param.grad = None
            for param in self._trained:
                if param.dtype is policy.params:
                    param.grad = torch.empty_like(param, dtype=policy.grads)
            del sent
        elif policy.reduce is not policy.params:
            largest = sorted(half, key=lambda bucket: bucket.nbytes)[-2:]
            _ = [bucket.to(policy.reduce) for bucket in largest]


def _assigned(params: Iterable[Tensor]) -> Iterable[tuple[int, torch.dtype]]:
    """Yields each bucket's elements and dtype, in the order of backward: one of each dtype is open at a time."""
    first, elements = True, dict[torch.dtype, int]()
    for param in params:
        elements[param.dtype] = elements.get(param.dtype, 0) + param.numel()
        if elements[param.dtype] * param.itemsize >= (FIRST if first else OTHERS):
            yield elements.pop(param.dtype), param.dtype
            first = False
    yield from ((size, dtype) for dtype, size in elements.items())
