"""Fused optimizers that are wrong in a dtype: found by trying, since versions of torch and devices differ.

torch 2.13's fused SGD leaves float16 and bfloat16 parameters on a CPU as they are, in whole blocks (pytorch/pytorch
issue 191763).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

_KINDS: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW)


def check_fused(optimizers: Iterable[Optimizer], dtype: torch.dtype, device_type: str) -> None:
    """Raises `ValueError` for one of torch's fused optimizers that does not step parameters of `dtype` as it should."""
    for optimizer in optimizers:
        kind: Any = type(optimizer)
        fused = any(group.get("fused") for group in optimizer.param_groups)
        if fused and kind in _KINDS and not _steps_right(kind, dtype, device_type):
            raise ValueError(
                f"{kind.__name__}(fused=True) of torch {torch.__version__} does not step {dtype} parameters on "
                f"{device_type}: pass fused=False, or foreach=True [fused-optimizer]"
            )


@functools.cache
def _steps_right(kind: Callable[..., Optimizer], dtype: torch.dtype, device_type: str) -> bool:
    """Whether a fused step of 64 elements, which fill vector registers, moves them as a plain step does."""
    stepped = []
    for options in ({"fused": True}, {"fused": False, "foreach": False}):
        param = torch.ones(64, dtype=dtype, device=device_type, requires_grad=True)
        param.grad = torch.full_like(param, 0.5)
        kind([param], lr=0.125, **options).step()
        stepped.append(param.detach().float())
    return torch.allclose(stepped[0], stepped[1], atol=0.02)
