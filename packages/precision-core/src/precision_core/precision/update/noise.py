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

_MASK = 2**64 - 1
_KEPT = 1 << 18
"""Elements, as many as a piece has at most."""


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
        self._counts: Tensor | None = None

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
        self._counts = None

    def numbers(self, optimizer: Optimizer) -> dict[int, int]:
        """Returns id of a parameter -> its number: by its name in the models, else by its place in the optimizer."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        numbers = {id(param): number for number, param in enumerate(params)}
        for model in self._models:
            for name, param in model.named_parameters():
                if id(param) in numbers:
                    numbers[id(param)] = zlib.crc32(name.replace("_orig_mod.", "").encode())
        return numbers

    def bits(self, place: Place, count: int, what: str, device: torch.device) -> Tensor:
        """Returns int32 (count,), uniform from 0 to 65,535."""
        if self.seed is None:
            self.seed = torch.initial_seed() & (2**63 - 1)
        key = 0
        for part in (self.seed, self.step, place.number, zlib.crc32(what.encode()), place.first >> 32):
            key = _mixed(key ^ part)
        first = place.first & 0xFFFFFFFF
        if place.indices is None:
            x = self._counted(count, device).add(_signed(first))
        else:
            x = place.indices[place.first : place.first + count].clone()
        x.mul_(_signed(0x9E3779B9)).add_(_signed(key))
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x7FEB352D))
        x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).add_(_signed(key >> 32)).mul_(_signed(0x846CA68B))
        return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)

    def _counted(self, count: int, device: torch.device) -> Tensor:
        """Returns 0, 1, 2, ... (int32): the same tensor for pieces, as counting takes longer than all of the mixing."""
        if count > _KEPT:
            return torch.arange(count, dtype=torch.int32, device=device)
        if self._counts is None or self._counts.device != device or len(self._counts) < count:
            self._counts = torch.arange(count, dtype=torch.int32, device=device)
        return self._counts[:count]

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


def _signed(word: int) -> int:
    """Returns the int32 with the low 32 bits of `word`."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
