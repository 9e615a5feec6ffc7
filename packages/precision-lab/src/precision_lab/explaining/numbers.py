"""What the values of a tensor are like: its range, and how much of it is inf, NaN or zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """Of one tensor; smallest and largest are absolute, of its finite values that are not zero."""

    dtype: str
    shape: tuple[int, ...]
    smallest: float
    largest: float
    zeros: float  # shares
    infs: float
    nans: float

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return not self.infs and not self.nans

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return {**asdict(self), "shape": list(self.shape)}

    def __str__(self) -> str:
        size = "x".join(str(each) for each in self.shape) or "one value"
        parts = [f"{self.dtype} {size}"]
        if self.largest:
            parts.append(f"|x| {self.smallest:.3g} to {self.largest:.4g}")
        for share, name in ((self.zeros, "zero"), (self.infs, "inf"), (self.nans, "NaN")):
            if share:
                parts.append(f"{percent(share)} {name}")
        return ", ".join(parts)


def percent(share: float) -> str:
    """Returns a share as a percentage that is neither 0 nor 100 where the share is not."""
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    return "under 0.1 %" if share < 0.001 else "over 99.9 %" if share > 0.999 else f"{share * 100:.3g} %"


def numbers_of(tensor: Tensor) -> Numbers:
    """Returns what the values of a tensor are like."""
    value = local(tensor.detach())
    dtype = str(value.dtype).removeprefix("torch.")
    shape = tuple(value.shape)
    count = value.numel()
    if not count or value.is_meta:
        return Numbers(dtype, shape, 0.0, 0.0, 0.0, 0.0, 0.0)
    if value.is_complex():
        value = value.abs()
    value = value.to(torch.float64 if value.device.type != "mps" else torch.float32).abs()
    finite = value.isfinite()
    nonzero = value[finite & (value != 0)]
    return Numbers(
        dtype,
        shape,
        float(nonzero.min()) if nonzero.numel() else 0.0,
        float(nonzero.max()) if nonzero.numel() else 0.0,
        float((value == 0).sum()) / count,
        float(value.isinf().sum()) / count,
        float(value.isnan().sum()) / count,
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite; of one that has no such values: True."""
    value = local(tensor)
    if not (value.is_floating_point() or value.is_complex()) or value.is_meta or not value.numel():
        return True
    if value.layout is not torch.strided:
        return True
    if value.itemsize < 2:  # float8 and narrower: few operations know them
        value = value.to(torch.float32)
    return bool(value.detach().isfinite().all())


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples, lists, dicts, and in what has attributes as a dataclass does."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or hasattr(value, "keys"):
        for key in list(value.keys()):
            yield from tensors(value[key])
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from tensors(each)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from tensors(getattr(value, name))


def end_of(dtype: str) -> float:
    """Returns the largest number of a format; inf for what is none."""
    found = getattr(torch, dtype, None)
    return float(torch.finfo(found).max) if isinstance(found, torch.dtype) and found.is_floating_point else math.inf


def words(text: str) -> frozenset[str]:
    """Returns the words of a text, as names of operations are listed."""
    return frozenset(text.split())
