"""Options of torch's optimizers that are zero or infinite in the parameters' dtype, in which their steps compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from precision_core.policy.dtypes import dtype_name

_WHAT_HAPPENS = {
    ("eps", 0.0): "a gradient whose square is 0 is divided by 0",
    ("eps", math.inf): "no parameter moves",
    ("lr", math.inf): "torch refuses the step, or parameters become infinite",
    ("lr * weight_decay", 0.0): "no weight decays",
    ("lr * weight_decay", math.inf): "weights become infinite",
}
_INSTEAD = {"eps": "eps=1e-4", "lr": "a smaller lr", "lr * weight_decay": "a larger weight_decay, or 0"}


def check_hyperparameters(
    optimizer: Optimizer, groups: Iterable[int], dtype_of: Callable[[nn.Parameter], torch.dtype]
) -> None:
    """Raises `ValueError` where an option in one of the groups, by index, is 0 or infinite in its parameters' dtype.

    Fused steps compute in float32. Optimizers that are not torch's are not checked.
    """
    if not any(
        kind.__module__.startswith("torch.optim.") and kind is not Optimizer for kind in type(optimizer).__mro__
    ):
        return
    for index in groups:
        group = optimizer.param_groups[index]
        if group.get("fused"):
            continue
        for dtype in {dtype_of(param) for param in group["params"]}:
            for name, value in _options(group):
                stored = abs(torch.tensor(value, dtype=torch.float64).to(dtype).item())
                if value and (name, stored) in _WHAT_HAPPENS:
                    raise ValueError(
                        f"{type(optimizer).__name__}: {name}={value:g} of param_groups[{index}] is {stored:g} in "
                        f"{dtype_name(dtype)}, which its step computes in: {_WHAT_HAPPENS[name, stored]}. Pass "
                        f"{_INSTEAD[name]}, {_fused(optimizer)}or "
                        f'precision="{"bf16-mixed" if dtype is torch.bfloat16 else "16-mixed"}"'
                        " [optimizer-option]"
                    )


def _fused(optimizer: Optimizer) -> str:
    """Returns the advice to fuse, for optimizers that can be; torch's fused SGD does not step half on every device."""
    if "fused" not in optimizer.defaults or isinstance(optimizer, SGD):
        return ""
    return "fused=True, which computes in float32, "


def _options(group: dict[str, Any]) -> Iterator[tuple[str, float]]:
    eps = group.get("eps")
    for each in eps if isinstance(eps, tuple) else [eps]:  # Adafactor has two
        if each is not None:
            yield "eps", float(each)
    lr = group.get("initial_lr", group.get("lr"))  # a scheduler may begin or end with as little as it wants
    if lr is not None:
        yield "lr", float(lr)
        if group.get("decoupled_weight_decay"):  # else the decay is added to gradients, without lr
            yield "lr * weight_decay", float(lr) * float(group["weight_decay"])
