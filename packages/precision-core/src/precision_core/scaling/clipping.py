"""Clipping: the checks on the arguments, and the plain case in which gradients are not scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from precision_core.policy.dtypes import HALF_DTYPES


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
            "together, clip_val=0.5 to limit each element [clip-arguments]"
        )
    limit = clip_val if max_norm is None else max_norm
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        name = "clip_val" if max_norm is None else "max_norm"
        raise ValueError(f"clip_gradients got {name}={limit!r}: expected a positive number")
    return Clip(max_norm, clip_val, norm_type, error_if_nonfinite)


def clip_unscaled(params: Sequence[nn.Parameter], clip: Clip) -> Tensor | None:
    """Clips unscaled gradients in place.

    Returns the norm before clipping (float32 of no dimensions, float64 for float64 and where float32 does not hold it)
    for `max_norm`, None for `clip_val`. Of sharded gradients it is the norm over all ranks; unsharded ones beside
    them count once. Sparse gradients are coalesced.

    Raises:
        RuntimeError: `clip.error_if_nonfinite` and the norm is not finite.
    """
    kinds = [[_Gradient(param) for param in kind] for kind in by_mesh(params)]
    if clip.clip_val is not None:
        for each in [each for kind in kinds for each in kind]:
            each.values.clamp_(-clip.clip_val, clip.clip_val)
        return None
    assert clip.max_norm is not None
    norm = norm_over([[each.values for each in kind] for kind in kinds], clip.norm_type)
    check_norm(norm, clip)
    for kind in kinds:
        _multiply(kind, clip.max_norm, norm)
    return norm


def norm_over(kinds: Sequence[list[Tensor]], norm_type: float) -> Tensor:
    """Returns the norm of all gradients together, float32 or float64; each list is sharded over the same ranks."""
    norm = _total([_norm(kind, norm_type) for kind in kinds], norm_type)
    if not any(kinds) or not norm.is_cpu or _SMALL < norm.item() < math.inf:
        return norm
    # A sum of squares may have left the dtype's range.
    wide = _total([_wide_norm(kind, norm_type) for kind in kinds], norm_type)
    fits = norm.dtype is torch.float32 and wide.item() <= torch.finfo(torch.float32).max
    return wide.float() if fits else wide


def check_norm(norm: Tensor, clip: Clip) -> None:
    """Raises `RuntimeError` where `clip.error_if_nonfinite` and the norm is not finite."""
    if clip.error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"clip_gradients(error_if_nonfinite=True): the {clip.norm_type:g}-norm of the gradients is non-finite, "
            f"{norm.item()}: look for NaN in the data or the loss [nonfinite-norm]"
        )


_SMALL = 1e-15
"""Where squares of float32 begin to be lost."""


class _Gradient:
    """A parameter's gradient; of a sparse one, which is coalesced, the values."""

    def __init__(self, param: nn.Parameter) -> None:
        assert param.grad is not None
        self.param = param
        self.is_sparse = param.grad.is_sparse
        if self.is_sparse:
            param.grad = param.grad.coalesce()  # else one row may be there twice
        self.values = param.grad._values() if self.is_sparse else param.grad


def _norm(gradients: list[Tensor], norm_type: float) -> Tensor:
    """Returns the norm, summed in float32 where gradients are half: a float16 norm ends at 65504."""
    halves = [each for each in gradients if each.dtype in HALF_DTYPES]
    norms = []
    if len(halves) < len(gradients) or not gradients:
        # As torch's clip_grad_norm_, which torch_xla replaces by one that reads values from the device.
        norms.append(get_total_norm([each for each in gradients if each.dtype not in HALF_DTYPES], norm_type))
    on_cpu = [each for each in halves if each.device.type in ("cpu", "xla")]  # there casts are faster, or free
    norms += [torch.linalg.vector_norm(each.float(), norm_type) for each in on_cpu]
    others = [each for each in halves if each.device.type not in ("cpu", "xla")]
    if others:
        norms += torch._foreach_norm(others, norm_type, dtype=torch.float32)
    return unsharded(_total(norms, norm_type))


def _total(norms: list[Tensor], norm_type: float) -> Tensor:
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]), norm_type)


def _wide_norm(gradients: list[Tensor], norm_type: float) -> Tensor:
    """Returns the norm in float64; of float64 gradients with those powers of two before them that it takes."""
    norm = torch.zeros((), dtype=torch.float64)
    for exponent in (0, -600, 600):
        norms = [torch.linalg.vector_norm(each.double() * 2.0**exponent, norm_type) for each in gradients]
        norm = unsharded(_total(norms, norm_type)) / 2.0**exponent
        if 0 < norm.item() < math.inf or not any(each.dtype is torch.float64 for each in gradients):
            break
    return norm


def _multiply(gradients: list[_Gradient], max_norm: float, norm: Tensor) -> None:
    """Multiplies gradients by max_norm / norm where that is below 1."""
    dense = [each.param for each in gradients if not each.is_sparse and each.values.dtype not in HALF_DTYPES]
    if dense:
        clip_grads_with_norm_(dense, max_norm, norm)
    rest = [each.values for each in gradients if each.is_sparse or each.values.dtype in HALF_DTYPES]
    if rest:
        # In two factors: the one may be too small for the gradients' dtype, in which devices take it.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        first = factor.clamp(min=2.0**-13)
        for each in rest:
            each.mul_(first.to(each.device, each.dtype)).mul_((factor / first).to(each.device, each.dtype))


def unsharded(value: Tensor) -> Tensor:
    """Returns the full tensor of a sharded one; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def by_mesh(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Returns the parameters by the ranks over which their gradients are sharded: torch mixes them in no operation."""
    kinds: dict[object, list[nn.Parameter]] = {}
    for param in params:
        if param.grad is not None:
            mesh = None if type(param.grad) is Tensor else getattr(param.grad, "device_mesh", None)
            kinds.setdefault(mesh, []).append(param)
    return list(kinds.values()) or [[]]
