"""Clipping true gradients: the checks on the arguments, and the plain case in which gradients are not scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_


@dataclass(frozen=True)
class Clip:
    """How to clip: exactly one of `max_norm` (of all gradients together) and `clip_val` (of each element).

    Raises `ValueError` for both, neither, or a limit that is no positive number.
    """

    max_norm: float | None = None
    clip_val: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False

    def __post_init__(self) -> None:
        given = {
            name: value
            for name, value in (("max_norm", self.max_norm), ("clip_val", self.clip_val))
            if value is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"clip_gradients takes exactly one of max_norm and clip_val, got {'both' if given else 'neither'}: "
                "pass max_norm=1.0 to limit the norm of all gradients together, clip_val=0.5 to limit each element"
            )
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"clip_gradients got {name}={value!r}: expected a positive number")


def clip_true_gradients(params: Sequence[nn.Parameter], clip: Clip) -> Tensor | None:
    """Clips unscaled gradients in place with torch's own functions.

    Returns the norm before clipping (a float tensor of no dimensions) for `max_norm`, None for `clip_val`.
    """
    if clip.clip_val is not None:
        clip_grad_value_(params, clip.clip_val)
        return None
    assert clip.max_norm is not None
    return clip_grad_norm_(params, clip.max_norm, clip.norm_type, clip.error_if_nonfinite)
