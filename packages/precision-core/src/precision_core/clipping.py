"""Clipping true gradients: the checks on the arguments, and the plain case in which gradients are not scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm


class Clip(NamedTuple):
    """How to clip, as `make_clip` has checked it."""

    max_norm: float | None
    clip_val: float | None
    norm_type: float
    error_if_nonfinite: bool


def make_clip(max_norm: float | None, clip_val: float | None, norm_type: float, error_if_nonfinite: bool) -> Clip:
    """Returns how to clip: exactly one of `max_norm` (of all gradients together) and `clip_val` (of each element).

    Raises:
        ValueError: both, neither, or a limit that is no positive number.
    """
    if (max_norm is None) == (clip_val is None):
        raise ValueError(
            "clip_gradients takes exactly one of max_norm and clip_val, got "
            f"{'neither' if max_norm is None else 'both'}: pass max_norm=1.0 to limit the norm of all gradients "
            "together, clip_val=0.5 to limit each element"
        )
    limit = clip_val if max_norm is None else max_norm
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        name = "clip_val" if max_norm is None else "max_norm"
        raise ValueError(f"clip_gradients got {name}={limit!r}: expected a positive number")
    return Clip(max_norm, clip_val, norm_type, error_if_nonfinite)


def clip_true_gradients(params: Sequence[nn.Parameter], clip: Clip) -> Tensor | None:
    """Clips unscaled gradients in place with torch's own functions.

    Returns the norm before clipping (a float tensor of no dimensions) for `max_norm`, None for `clip_val`. Of sharded
    gradients it is the norm over all ranks; whole ones beside them count once, as on each rank.
    """
    kinds = _by_mesh(params)
    if clip.clip_val is not None:
        for kind in kinds:
            clip_grad_value_(kind, clip.clip_val)
        return None
    assert clip.max_norm is not None
    if len(kinds) == 1:  # as torch's clip_grad_norm_, which torch_xla replaces by one that reads values from the device
        gradients = [_summed_in(param.grad) for param in kinds[0] if param.grad is not None]
        norm = get_total_norm(gradients, clip.norm_type, clip.error_if_nonfinite)
        clip_grads_with_norm_(kinds[0], clip.max_norm, norm)
        return whole(norm)
    parts = [[param.grad for param in kind if param.grad is not None] for kind in kinds]
    norms = [whole(get_total_norm(each, clip.norm_type)) for each in parts]
    norm = get_total_norm([each.to(norms[0].device) for each in norms], clip.norm_type, clip.error_if_nonfinite)
    for kind in kinds:
        clip_grads_with_norm_(kind, clip.max_norm, norm)
    return norm


def _summed_in(gradient: Tensor) -> Tensor:
    """Returns the gradient as its norm is taken of it: XLA sums in the dtype itself, and the others in float32.

    Of 1,000,000 bfloat16 gradients the norm was half of what it is. In XLA's program the cast is part of the sum.
    """
    is_half = gradient.dtype in (torch.bfloat16, torch.float16)
    return gradient.float() if is_half and gradient.device.type == "xla" else gradient


def whole(value: Tensor) -> Tensor:
    """Returns `value` itself, or what all ranks' shards of it make together."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _by_mesh(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Returns the parameters by the ranks over which their gradients are sharded: torch mixes them in no operation."""
    kinds: dict[object, list[nn.Parameter]] = {}
    for param in params:
        if param.grad is not None:
            mesh = None if type(param.grad) is Tensor else getattr(param.grad, "device_mesh", None)
            kinds.setdefault(mesh, []).append(param)
    return list(kinds.values()) or [[]]
