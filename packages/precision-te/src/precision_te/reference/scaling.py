"""Scaling: which values share a scale, how it is chosen, and the values that are left on the format's grid.

Matrices are quantised along their last axis, the one that a product sums over. Rows or columns that do not fill a block
are filled up with zeros, which changes no scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from precision_te.reference.formats import FORMATS, Format, power_of_2_above, power_of_2_below

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix (rows, columns): each element is value * scale * outer, all float32."""

    values: Tensor
    """On the format's grid."""
    scales: Tensor
    """The scales of the blocks, expanded to their elements, or a single 1."""
    outer: Tensor
    """The scale of the tensor."""

    def dequantize(self) -> Tensor:
        """Returns the float32 matrix."""
        return self.values * self.scales * self.outer

    def product(self, other: Quantized) -> Tensor:
        """Returns self @ other.T in float32, accumulated in float32.

        The outer scales follow the product, as in the hardware. Hardware applies the blocks' scales to partial sums in
        float32, here they are applied to the values before; that differs by float32's rounding.
        """
        result = (self.values * self.scales) @ (other.values * other.scales).T
        scaled = (result * self.outer).mul_(other.outer)
        small, large = torch.minimum(self.outer, other.outer), torch.maximum(self.outer, other.outer)
        rescaled = result.mul_(small).mul_(large)  # the large one first may be beyond float32's range on the way
        return torch.where((scaled.abs() < math.inf) | ~(rescaled.abs() < math.inf), scaled, rescaled)


def amax(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Returns the largest magnitude in float32, over `dims` (kept) or all; of nothing it is 0. NaN does not count."""
    x = x.detach().float()
    x = torch.where(x.isnan(), 0.0, x).abs()
    if dims is not None:
        return x.amax(dims, keepdim=True)
    return x.amax() if x.numel() else x.new_zeros((), dtype=torch.float32)


def quotient(number: float, x: Tensor) -> Tensor:
    """Returns number / x, rounded once: torch computes it as number * (1 / x)."""
    return torch.full_like(x, number, dtype=x.dtype) / x


def scale_of(largest: Tensor, format: Format, *, power_of_2: bool = False, limit: float = _LARGEST) -> Tensor:
    """Returns what values up to `largest` are multiplied by to fill the format's range; 1 for 0 and infinity.

    `limit` is the scale where it would overflow: the largest value of the tensor's own dtype.
    """
    scale = quotient(format.max, largest)
    scale = torch.where(scale.isinf(), limit, scale)
    if power_of_2:
        scale = power_of_2_below(scale)
    return torch.where((largest == 0) | largest.isinf(), 1.0, scale)


def per_tensor(x: Tensor, format: Format, scale: Tensor) -> Quantized:
    """Quantises `x` (rows, columns) with one float32 scale that is given."""
    return Quantized(format.round(x.float() * scale), x.new_ones((), dtype=torch.float32), scale.reciprocal())


def blocks(x: Tensor, format: Format, shape: tuple[int, int], *, power_of_2: bool) -> Quantized:
    """Quantises `x` with one float32 scale a block: 1x128 or 128x128 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)."""
    parts = _split(x, shape)
    limit = torch.finfo(x.dtype).max if x.dtype is not torch.float64 else _LARGEST
    scale = scale_of(amax(parts, (1, 3)), format, power_of_2=power_of_2, limit=limit)
    return _joined(x, format.round(parts * scale), scale.reciprocal(), x.new_ones((), dtype=torch.float32))


def mxfp8(x: Tensor, format: Format, shape: tuple[int, int]) -> Quantized:
    """Quantises `x` with one power of 2 a block of 1x32 or 32x32 (OCP MX v1.0), E8M0, rounded up as the vendor does."""
    parts = _split(x, shape)
    scale = power_of_2_above(amax(parts, (1, 3)) * _number(format.max, x).reciprocal())
    return _joined(x, format.round(parts / scale), scale, x.new_ones((), dtype=torch.float32))


def nvfp4(x: Tensor, shape: tuple[int, int], *, stochastic: bool = False) -> Quantized:
    """Quantises `x` to E2M1 with an E4M3 scale a block of 1x16 or 16x16, and a float32 one (arXiv:2509.25149).

    The order of operations is that of the vendor's `NVFP4QuantizerRef`. With an infinity in it, no result is finite.
    """
    four, eight = FORMATS["e2m1"], FORMATS["e4m3"]
    parts = _split(x, shape)
    largest = amax(x)
    outer = quotient(eight.max * four.max, largest).clamp(max=_LARGEST)
    outer = torch.where(outer == 0, 1.0, outer)
    sixth = _number(four.max, x).reciprocal()
    scale = eight.round((amax(parts, (1, 3)) * (outer * sixth)).clamp(max=_LARGEST))
    factor = (1.0 / (scale * outer.reciprocal())).clamp(max=_LARGEST)
    return _joined(x, four.round(parts * factor, stochastic=stochastic), scale, largest / (eight.max * four.max))


_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The vendor's constants."""


def hadamard(x: Tensor) -> Tensor:
    """Returns `x` (rows, columns) with 16 columns at a time multiplied by a Hadamard matrix with random signs.

    It spreads outliers over 16 values, and does not change the product of two matrices that are both transformed
    (arXiv:2509.25149). Columns are filled up with zeros to a multiple of 16; computed in the dtype of `x`.
    """
    matrix = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    while len(matrix) < 16:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    turn = torch.stack([_number(sign, x) for sign in _SIGNS]).unsqueeze(1) * matrix / 4
    x = F.pad(x, (0, -x.shape[1] % 16))
    return (x.reshape(-1, 16) @ turn.to(x.dtype)).reshape(x.shape)


def _number(number: float, x: Tensor) -> Tensor:
    """Returns it in float32 where `x` is; made there, as the host would wait for a copy."""
    return torch.full((), number, dtype=torch.float32, device=x.device)


def _split(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns `x` in float32 as (blocks, rows of one, blocks, columns of one)."""
    rows, columns = shape
    x = F.pad(x.float(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _joined(x: Tensor, values: Tensor, scales: Tensor, outer: Tensor) -> Quantized:
    """Returns blocks as a matrix again, of the shape of `x`."""
    scales = scales.expand_as(values)
    flat = (values.shape[0] * values.shape[1], values.shape[2] * values.shape[3])
    rows, columns = x.shape
    return Quantized(values.reshape(flat)[:rows, :columns], scales.reshape(flat)[:rows, :columns], outer)
