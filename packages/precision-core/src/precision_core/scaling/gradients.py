"""Gradients as an optimizer holds them: finding them, multiplying them, and clipping scaled ones in one pass."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from precision_core.override import original
from precision_core.scaling.clipping import Clip, unsharded


def params_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yields the parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns the gradients that are there; of sparse ones the values."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    return gradients


@torch.no_grad()
def multiply(gradients: list[Tensor], factor: float | Tensor) -> None:
    """Multiplies gradients in place."""
    narrow = [gradient for gradient in gradients if gradient.dtype is torch.float16]
    for gradient in narrow:
        multiply_float16(gradient, factor)
    rest = [gradient for gradient in gradients if gradient.dtype is not torch.float16] if narrow else gradients
    if rest:
        torch._foreach_mul_(rest, factor)


def multiply_float16(gradient: Tensor, factor: float | Tensor) -> None:
    """Multiplies a gradient in place by any factor; torch 2.13's `_foreach_mul_` makes inf of one beyond float16."""
    local: Any = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    if not isinstance(factor, Tensor) or local.is_cpu:
        local.mul_(factor.to(local.device) if isinstance(factor, Tensor) else factor)
        return
    factor = factor.to(local.device)  # devices take its value in the gradient's dtype, so in two factors
    first = factor.clamp(2.0**-13, 2.0**13)
    local.mul_(first).mul_(factor / first)


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no element is inf or NaN; waits once for each device."""
    counts: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        # Counted, as torch 2.9 adds up the ranks' answers to all() of a sharded tensor: one rank's yes was everybody's.
        count = unsharded(torch.logical_not(torch.isfinite(gradient)).sum())
        counts.setdefault(count.device, []).append(count)
    return not any(bool(torch.stack(each).any()) for each in counts.values())


def is_plain(gradients: Sequence[Tensor]) -> bool:
    """Whether there are any, and all are ordinary dense float32 tensors on one device without a graph of their own."""
    kinds = {(type(each), each.layout, each.dtype, each.device, each.requires_grad) for each in gradients}
    if len(kinds) != 1:
        return False
    ((kind, layout, dtype, _, has_graph),) = kinds
    return kind is Tensor and layout is torch.strided and dtype is torch.float32 and not has_graph


def unscale_plain(gradients: list[Tensor], inverse: Tensor) -> Tensor:
    """Multiplies plain gradients on the CPU by 1 / scale; returns 1.0 or 0.0 for whether inf or NaN was found.

    The kernel and the rounding of torch's `GradScaler.unscale_`, without its grouping by device and dtype.
    """
    flag = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, flag, inverse)
    return flag


def clip_scaled(gradients: list[Tensor], scale: float | Tensor, clip: Clip) -> tuple[Tensor, Tensor] | None:
    """Unscales and clips plain gradients in place: the norm of the scaled ones, then one multiplication.

    That is one pass over the gradients less than unscaling, then clipping. `scale` is a float where values may be read
    from the device, else a tensor. Returns the unscaled norm, and 1.0 or 0.0 for whether inf or NaN was found. With a
    float, a norm that is not finite returns None and changes nothing: the sum of squares may have overflowed, so each
    element has to be checked.
    """
    assert clip.max_norm is not None
    # torch's get_total_norm, without its grouping by device and dtype
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, clip.norm_type)), clip.norm_type)
    if isinstance(scale, Tensor):
        norm = total / scale
        torch._foreach_mul_(gradients, (clip.max_norm / (norm + 1e-6)).clamp(max=1.0) / scale)
        return norm, torch.logical_not(torch.isfinite(total)).float()
    value = total.item() / scale
    if not math.isfinite(value):
        return None
    torch._foreach_mul_(gradients, min(clip.max_norm / (value + 1e-6), 1.0) / scale)
    return total / scale, torch.zeros((), device=total.device)


def runs_closure_first(optimizer: Optimizer) -> bool:
    """Whether its `step` runs a closure once, before anything else, so that it may as well be run before it."""
    module = getattr(original(optimizer, "step"), "__module__", None) or ""
    return takes_flag(optimizer) or module.partition(".")[0] == "torch"


def takes_flag(optimizer: Optimizer) -> bool:
    """Whether the optimizer's `step` takes the flag as `found_inf=` and skips by itself, as torch_xla's do."""
    kind: Any = type(optimizer)
    return _has_flag(kind)


@functools.cache
def _has_flag(kind: Any) -> bool:
    return "found_inf" in inspect.signature(kind.step).parameters


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer takes the flag found_inf and skips by itself, and may be trusted with it.

    torch's fused SGD leaves a momentum buffer uninitialised when its first step is skipped.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return not isinstance(optimizer, SGD) or all(
        not group["momentum"] or all("momentum_buffer" in optimizer.state[param] for param in group["params"])
        for group in optimizer.param_groups
    )
