"""Optimizer states of 8 bits: bitsandbytes' Adam8bit or AdamW8bit in place of torch's Adam or AdamW."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch.optim import Optimizer

_KEPT = ("lr", "betas", "eps", "weight_decay")
_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")


def with_8bit_states(optimizer: Optimizer) -> Optimizer:
    """Returns bitsandbytes' optimizer for the same parameters, in the same groups with the same settings.

    States are quantised in blocks of 256 elements. Those of tensors with fewer than 4096 elements stay float32, as
    bitsandbytes does it.

    Raises:
        TypeError: it is neither torch's Adam nor its AdamW.
        ValueError: a setting that bitsandbytes does not have, or understands otherwise; or it has stepped already.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise TypeError(
            f"8-bit states are bitsandbytes' for torch.optim.Adam and AdamW, and this is a {type(optimizer).__name__}"
        )
    if optimizer.state:
        raise ValueError("with_8bit_states: the optimizer has stepped already; ask before the first step")
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if given := [key for key in _REFUSED if group.get(key)]:
            raise ValueError(f"{name}({given[0]}=True): bitsandbytes' 8-bit optimizers do not have it")
        decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
        if group["weight_decay"] and not decoupled:
            raise ValueError(
                f"{name}(weight_decay={group['weight_decay']}): bitsandbytes takes the decay off the weights, as AdamW "
                "does, where torch's Adam adds it to the gradients; use AdamW"
            )
    theirs: Any = bitsandbytes.optim
    kind = theirs.AdamW8bit if isinstance(optimizer, torch.optim.AdamW) else theirs.Adam8bit
    groups = [
        {"params": group["params"]} | {key: _number(group[key]) for key in _KEPT} for group in optimizer.param_groups
    ]
    made: Optimizer = kind(groups)
    return made


def _number(value: object) -> object:
    return value.item() if isinstance(value, torch.Tensor) else value  # torch takes a rate that is a tensor
