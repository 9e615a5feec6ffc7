"""Noise: random bits by counter, so that a rounding depends on where a number is, not on who rounds it or when.

The bits of an element are a hash of a seed, the number of its optimizer's step, the parameter's name, what is rounded
(the parameter, or which moment), and the element's index in the full parameter. So any number of ranks and optimizers
rounds alike, in pieces of any size, and a resumed run goes on with the same bits.

The mixing is lowbias32's (C. Wellons, Prospecting for Hash Functions, 2018), keyed by splitmix64 (Steele, Lea, Flood,
Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_core.precision.update.bits import may_hold_nan
from precision_core.precision.update.layout import local_part
from precision_core.precision.update.rows import LARGEST

_MASK = 2**64 - 1
_SPREAD = 0x9E3779B9


class Place(NamedTuple):
    """Where a piece lies: the parameter's number, and the indices of its elements."""

    number: int
    first: int
    indices: Tensor | None = None
    """Indices of all elements (int32), where they do not follow each other; `first` counts in it."""


class Noise:
    """Draws 16 random bits for each element of a parameter in `models`; `seed` is torch's when it is first needed."""

    def __init__(self, models: Collection[nn.Module] = ()) -> None:
        self.seed: int | None = None
        self.step = 0
        """Of the optimizer that steps now."""
        self._models = models
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._loaded: list[int] = []
        self._kept: Tensor | None = None
        """For pieces, while a step lasts: multiples of `_SPREAD`, which take longer than the mixing, and memory."""

    def register(self, optimizer: Optimizer) -> None:
        """Counts the steps of `optimizer` from now on, or from what a state has for the one in its place."""
        if optimizer not in self._steps:
            place = len(self._steps)
            self._steps[optimizer] = self._loaded[place] if place < len(self._loaded) else 0

    def begin(self, optimizer: Optimizer) -> None:
        """Begins a step of `optimizer`."""
        self.register(optimizer)
        self.step = self._steps[optimizer] = self._steps[optimizer] + 1

    def end(self) -> None:
        """Ends the step: nothing is kept in memory between steps."""
        self._kept = None

    def numbers(self, optimizer: Optimizer) -> dict[int, int]:
        """Returns id of a parameter -> its number: by its name in the models, else by its place in the optimizer."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        numbers = {id(param): number for number, param in enumerate(params)}
        for model in self._models:
            for name, param in model.named_parameters():
                if id(param) in numbers:
                    numbers[id(param)] = zlib.crc32(name.replace("_orig_mod.", "").encode())
        return numbers

    def bits(self, place: Place, count: int, what: str, device: torch.device, out: Tensor | None = None) -> Tensor:
        """Returns int32 (count,), uniform from 0 to 65,535; in the memory of `out`, float32, where it is given."""
        if self.seed is None:
            self.seed = torch.initial_seed() & (2**63 - 1)
        key = 0
        for part in (self.seed, self.step, place.number, zlib.crc32(what.encode()), place.first >> 32):
            key = _mixed(key ^ part)
        spread, shifted = self._memory(count, device)
        x = torch.empty_like(spread) if out is None else out.view(torch.int32)
        if place.indices is None:  # (first + n) * _SPREAD
            torch.add(spread, _signed(place.first * _SPREAD + key), out=x)
        else:
            torch.mul(place.indices[place.first : place.first + count], _signed(_SPREAD), out=x).add_(_signed(key))
        _fold(x, 16, shifted).mul_(_signed(0x7FEB352D))
        _fold(x, 15, shifted).add_(_signed(key >> 32)).mul_(_signed(0x846CA68B))
        return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)

    def _memory(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns 0, 1, 2, ... times `_SPREAD` (int32), and as much memory: the same for pieces."""
        kept = self._kept
        if kept is None or kept.device != device or kept.shape[1] < count:
            kept = torch.empty(2, count, dtype=torch.int32, device=device)
            torch.arange(count, out=kept[0]).mul_(_signed(_SPREAD))
            if count <= LARGEST:
                self._kept = kept
        spread, shifted = kept.unbind()
        return spread[:count], shifted[:count]

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed, and the steps of each optimizer in the order in which they were set up."""
        counted = list(self._steps.values())
        counted += self._loaded[len(counted) :]  # of optimizers that are not set up yet
        return {"seed": -1 if self.seed is None else self.seed, "steps": counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.seed = None if state["seed"] < 0 else state["seed"]
        self._loaded = list(state["steps"])
        for optimizer, steps in zip(list(self._steps), self._loaded, strict=False):
            self._steps[optimizer] = steps


def round_stochastically(value: Tensor, bits: Tensor, out: Tensor) -> None:
    """Writes float32 `value` into bfloat16 `out`: up with the probability of how near that is; `value` is used up.

    Both have one dimension; `bits` are 16 random bits for each. The mean is the value: a bfloat16 stays what it is, inf
    and NaN too. Beyond the largest bfloat16 the neighbour is inf.
    """
    words = value.view(torch.int32)
    is_nan = value.isnan() if may_hold_nan(value) else None
    words.add_(bits).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(words)
    if is_nan is not None:
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


def _fold(x: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """Makes of int32 `x`, which counts as unsigned here, `x ^ (x >> shift)`; returns it."""
    torch.bitwise_right_shift(x, shift, out=scratch).bitwise_and_(2 ** (32 - shift) - 1)
    return x.bitwise_xor_(scratch)


def _signed(word: int) -> int:
    """Returns the int32 with the low 32 bits of `word`."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
