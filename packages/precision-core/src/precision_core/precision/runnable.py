"""Which policies core's plugins run: others are refused, naming the plugin that runs them, if there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from precision_core.policy.policy import Policy

_AUTOCAST = (torch.bfloat16, torch.float16)

_REFUSED: tuple[tuple[Callable[[Policy], bool], str], ...] = (
    (
        lambda policy: policy.master is not None,
        "core keeps no master weights; DeepSpeedPrecision of precision-deepspeed does, or say master=none",
    ),
    (
        lambda policy: policy.mixed and policy.params is torch.float64,
        "nothing runs float64 params under a narrower compute; use 64-true, or float32 params",
    ),
    (
        lambda policy: policy.mixed and policy.compute not in _AUTOCAST,
        "a compute that differs from params is autocast's work, which knows bfloat16 and float16; nothing runs another",
    ),
    (
        lambda policy: policy.scale and policy.compute is not torch.float16,
        "nothing scales the loss without float16 compute; say scale=false",
    ),
    (
        lambda policy: policy.scale and policy.params is not torch.float32,
        "torch unscales no float16 gradients; DeepSpeedPrecision of precision-deepspeed scales over float32 master "
        "weights, or say params=float32",
    ),
    (
        lambda policy: policy.mixed and policy.params is not torch.float32,
        "mixed precision trains float32 params; say params=float32, or compute like params",
    ),
)


def check_runnable(policy: Policy) -> None:
    """Raises `ValueError` when no plugin of core runs `policy` or one of its exceptions."""
    for part in (policy.flat, *(exception for _, exception in policy.exceptions)):
        for refused, reason in _REFUSED:
            if refused(part):
                raise ValueError(f"precision={str(policy)!r} cannot run here: {reason} [cannot-run-here]")
