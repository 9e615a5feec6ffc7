"""Clipping true gradients: the checks on the arguments, and the plain case in which gradients are not scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_


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

    Returns the norm before clipping (a float tensor of no dimensions) for `max_norm`, None for `clip_val`.
    """
    if clip.clip_val is not None:
        clip_grad_value_(params, clip.clip_val)
        return None
    assert clip.max_norm is not None
    return clip_grad_norm_(params, clip.max_norm, clip.norm_type, clip.error_if_nonfinite)
