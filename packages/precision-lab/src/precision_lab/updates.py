"""Updates that round to nothing, counted while a run trains: of half parameters that are rounded to nearest.

Core samples every hundredth step, to warn; here every part of a run counts alike, a short one's too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from precision_core import Policy

SAMPLES = 16
"""Steps of a run that are looked at, evenly spread."""
ELEMENTS = 256
"""Of each parameter."""
TOO_MANY = 0.2
"""Share of updates that round to nothing, from which on a mode, or a module in it, is not trusted for longer runs."""
HALF = (torch.float16, torch.bfloat16)


class Unchanged:
    """Counts of updates that changed nothing, and of updates, for each parameter whose steps are rounded to nearest."""

    def __init__(self, model: nn.Module, policy: Policy, steps: int) -> None:
        rounds = policy.master is None and policy.rounding == "nearest"
        self._params = [(n, p) for n, p in model.named_parameters() if rounds and p.dtype in HALF and p.requires_grad]
        self._every = max(1, steps // SAMPLES)
        self.sums: dict[str, Tensor] = {}
        """Parameter -> sampled elements that did not change, and all that were sampled: what a run goes on from."""

    @contextmanager
    def sampling(self, step: int) -> Iterator[None]:
        """Context around the optimizer's step number `step`, which counts if it is one of those to look at."""
        if not self._params or step % self._every:
            yield
            return
        before = [
            (name, param, _part(param).clone(), _part(param.grad) != 0)
            for name, param in self._params
            if param.grad is not None and param.grad.layout is torch.strided
        ]
        yield
        for name, param, old, counts in before:
            same = (_part(param) == old) & counts
            found = torch.stack([same.sum(), counts.sum()])
            self.sums[name] = self.sums[name] + found if name in self.sums else found

    def counts(self) -> list[tuple[str, int, int]]:
        """Returns (parameter, elements whose updates change nothing, all of them), as the sample says."""
        sizes = {name: param.numel() for name, param in self._params}
        sums = {name: found.tolist() for name, found in self.sums.items()}
        return [(name, round(sizes[name] * same / seen), sizes[name]) for name, (same, seen) in sums.items() if seen]


def _part(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-len(flat) // ELEMENTS))]
