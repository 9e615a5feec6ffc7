"""Noise: random bits by counter, so that a rounding depends on where a number is, not on who rounds it or when.

The bits of an element are a hash of a seed, the number of the step, the parameter's place in its optimizer, what is
rounded (the parameter, or which moment), and the element's index in the full parameter. So any number of ranks rounds
alike, in pieces of any size, and a resumed run goes on with the same bits.

The mixing is lowbias32's (C. Wellons, Prospecting for Hash Functions, 2018), keyed by splitmix64 (Steele, Lea, Flood,
Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from precision_core.precision.update.layout import local_part

_MASK = 2**64 - 1


class Place(NamedTuple):
    """Where a piece lies: the parameter's number in its optimizer, and the indices of its elements."""

    number: int
    first: int
    indices: Tensor | None = None
    """Indices of all elements (int32), where they do not follow each other; `first` counts in it."""


class Noise:
    """Draws 16 random bits for each element; `seed` is drawn from torch's when it is first needed."""

    def __init__(self) -> None:
        self.seed: int | None = None
        self.step = 0

    def bits(self, place: Place, count: int, what: str, device: torch.device) -> Tensor:
        """Returns int32 (count,), uniform from 0 to 65,535."""
        if self.seed is None:
            self.seed = torch.initial_seed() & (2**63 - 1)
        key = 0
        for part in (self.seed, self.step, place.number, zlib.crc32(what.encode()), place.first >> 32):
            key = _mixed(key ^ part)
        first = place.first & 0xFFFFFFFF
        if place.indices is None:
            x = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(first))
        else:
            x = place.indices[place.first : place.first + count].clone()
        x.mul_(_signed(0x9E3779B9)).add_(_signed(key))
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x7FEB352D))
        x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).add_(_signed(key >> 32)).mul_(_signed(0x846CA68B))
        return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)

    def state_dict(self) -> dict[str, int]:
        """Returns seed and step."""
        return {"seed": -1 if self.seed is None else self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores what `state_dict` returned."""
        self.seed = None if state["seed"] < 0 else state["seed"]
        self.step = state["step"]


def round_stochastically(value: Tensor, bits: Tensor, out: Tensor) -> None:
    """Writes float32 `value` into bfloat16 `out`: up with the probability of how near that is; `value` is used up.

    Both have one dimension; `bits` are 16 random bits for each. The mean is the value: a bfloat16 stays what it is, inf
    and NaN too. Beyond the largest bfloat16 the neighbour is inf.
    """
    words = value.view(torch.int32)
    is_nan = value.isnan()
    words.add_(bits).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(words)
    out.masked_fill_(is_nan, float("nan"))


def index_of(param: Tensor) -> tuple[int, Tensor | None]:
    """Returns the index in the full parameter of this rank's first element, and of all where they do not follow it."""
    part, offsets = local_part(param.detach())
    if not hasattr(param, "to_local"):
        return 0, None
    strides = _contiguous(param.shape)
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    if list(part.shape[1:]) == list(param.shape[1:]):  # whole rows
        return first, None
    index = torch.full((), first, dtype=torch.int64)
    for size, stride in zip(part.shape, strides, strict=True):
        index = index.unsqueeze(-1) + torch.arange(size) * stride
    return 0, index.flatten().to(torch.int32).to(part.device)


def _contiguous(shape: torch.Size) -> list[int]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _signed(word: int) -> int:
    """Returns the int32 with the low 32 bits of `word`."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
