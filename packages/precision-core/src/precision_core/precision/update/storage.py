"""Storage: how a half parameter and its optimizer's state are read into float32 for a step, and written back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from precision_core.policy.policy import Policy
from precision_core.precision.masters import MASTER, REST
from precision_core.precision.update.bits import combine_all, split_all
from precision_core.precision.update.kinds import is_moment
from precision_core.precision.update.layout import alike, dense, flat, local, same_memory
from precision_core.precision.update.noise import Noise, Place, round_stochastically
from precision_core.precision.update.rests import Rests, reconcile_all, split_off
from precision_core.precision.update.rows import Row, copy_all, row_of


class Storage:
    """Stores parameters of one half dtype: the nearest value, and what else the policy says beside it."""

    key: str | None = None
    """In an optimizer's state, what is stored beside the weight; None: nothing is."""
    exact: tuple[torch.dtype, ...] = ()
    """Other dtypes whose values a weight holds exactly, with what is beside it."""

    def __init__(self, policy: Policy, models: Collection[nn.Module] = ()) -> None:
        self.params = policy.params
        self.state = policy.state
        self.noise = Noise(models) if policy.rounding == "stochastic" else None
        self.fixed: set[str] = set()
        """State that keeps its dtype: what optimizers list as such, codes and their tables in bitsandbytes'."""

    @property
    def note(self) -> str:
        """What a report says of it."""
        how = (
            "to the nearest value that they can have"
            if self.noise is None
            else "up or down by chance, right on average"
        )
        return f"the optimizer steps in float32, and parameters are rounded {how}"

    def split_off(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns what a wider parameter is stored as: its weight, and what is stored beside it."""
        return value.to(self.params), None

    def beside(self, param: Tensor) -> Tensor | None:
        """Returns what is stored beside the weight, of its shape and sharding, for a step to change."""
        return None

    def read(self, weights: Sequence[Tensor], besides: Sequence[Tensor], values: Row, scratch: Row) -> Row:
        """Returns float32 values of slices: `values`, or a row whose parts are `besides`; uses both rows."""
        copy_all(values.parts, weights)
        return values

    def write(
        self, values: Row, weights: Sequence[Tensor], besides: Sequence[Tensor], places: Sequence[Place], scratch: Row
    ) -> None:
        """Stores stepped values, of the row that `read` returned; with noise they lie at `places`; uses both rows."""
        if self.noise is None:
            copy_all(weights, values.parts)
            return
        for value, weight, place, part in zip(values.parts, weights, places, scratch.parts, strict=True):
            self._round(value, weight, "", place, part)

    def written(self, param: Tensor, beside: Tensor | None) -> None:
        """Takes note that all of `param` is written."""

    def known(self, param: Tensor) -> Tensor | None:
        """Returns what is stored beside the weight, if that is still the one that it was stored for."""
        return None

    def take(self, param: Tensor, beside: Tensor | None) -> None:
        """Takes what a state dict has for beside the weight; None: nothing."""

    def state_dtype(self, key: object, value: object, param: Tensor) -> torch.dtype | None:
        """Returns the dtype that a value in the state of `param` is kept in; None: it is no moment."""
        is_kept = key == self.key or key in self.fixed
        return self.state if not is_kept and is_moment(key, value, param) else None

    def write_state(self, key: str, value: Tensor, out: Tensor, place: Place, scratch: Tensor | None = None) -> None:
        """Stores a moment that was stepped; `value` is used up, and `scratch`, float32 of as many elements."""
        self._round(value, out, key, place, scratch)

    def _round(self, value: Tensor, out: Tensor, what: str, place: Place, scratch: Tensor | None) -> None:
        if self.noise is None or out.dtype is not torch.bfloat16:
            out.copy_(value)
            return
        values, rounded = flat(dense(value)), dense(out)
        memory = None if scratch is None else flat(scratch)
        bits = self.noise.bits(place, values.numel(), what, out.device, memory)
        round_stochastically(values, bits, flat(rounded))
        if rounded is not out:
            out.copy_(rounded)


class MasterStorage(Storage):
    """Stores the nearest half value, and beside it what makes it the float32 value that is stepped."""

    beside_dtype: torch.dtype

    def __init__(self, policy: Policy, models: Collection[nn.Module] = ()) -> None:
        super().__init__(policy, models)
        self.rests = Rests()

    def beside(self, param: Tensor) -> Tensor | None:
        rest = self.rests.of(param)
        if rest is None:
            return self._of_weight(param)
        if rest.device != param.device or rest.stride() != param.stride():
            moved = torch.empty_like(param, dtype=self.beside_dtype)  # in the order that pieces are cut in
            local(moved).copy_(local(rest))
            rest = moved
        return rest

    def _of_weight(self, param: Tensor) -> Tensor:
        """Returns what is beside a weight that is all there is."""
        raise NotImplementedError

    def written(self, param: Tensor, beside: Tensor | None) -> None:
        assert beside is not None
        self.rests.put(param, beside)

    def known(self, param: Tensor) -> Tensor | None:
        return self.rests.of(param)

    def take(self, param: Tensor, beside: Tensor | None) -> None:
        if beside is None:
            self.rests.drop(param)
        else:  # the weights may be loaded before it or after
            self.rests.put(param, beside, restored=True)


class RestStorage(MasterStorage):
    """Stores the nearest bfloat16, and in 16 bits the rest of its float32 value."""

    key = REST
    exact = (torch.float32, torch.float16)
    beside_dtype = torch.int16

    @property
    def note(self) -> str:
        return (
            "the optimizer steps exact float32 values: the parameters are the nearest bfloat16, and the optimizer's "
            f"state has the other 16 bits of each ({REST!r})"
        )

    def split_off(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        return split_off(value.float())

    def _of_weight(self, param: Tensor) -> Tensor:
        return torch.zeros_like(param, dtype=torch.int16)

    def read(self, weights: Sequence[Tensor], besides: Sequence[Tensor], values: Row, scratch: Row) -> Row:
        combine_all(weights, besides, values, scratch)
        return values

    def write(
        self, values: Row, weights: Sequence[Tensor], besides: Sequence[Tensor], places: Sequence[Place], scratch: Row
    ) -> None:
        split_all(values, weights, besides)


class FullStorage(MasterStorage):
    """Stores the nearest float16, and the full float32 value, which a step changes where it is.

    A float16 is no half of a float32 number: its exponent is shorter, and below 6e-5 it has fewer bits.
    """

    key = MASTER
    exact = (torch.float32, torch.bfloat16)
    beside_dtype = torch.float32

    @property
    def note(self) -> str:
        return (
            "the optimizer steps float32 values, which its state has in full "
            f"({MASTER!r}): the parameters are the nearest float16, gradients stay float16 and scaled until the step"
        )

    def split_off(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        master = value.float()
        return value.to(self.params), master.clone() if master is value else master

    def _of_weight(self, param: Tensor) -> Tensor:
        master = torch.empty_like(param, dtype=torch.float32)
        local(master).copy_(local(param))
        return master

    def read(self, weights: Sequence[Tensor], besides: Sequence[Tensor], values: Row, scratch: Row) -> Row:
        reconcile_all(besides, weights, scratch)
        return Row(values.flat, besides)

    def write(
        self, values: Row, weights: Sequence[Tensor], besides: Sequence[Tensor], places: Sequence[Place], scratch: Row
    ) -> None:
        for value, master in zip(values.parts, besides, strict=True):
            if not same_memory(value, master):
                master.copy_(value)
        copy_all(weights, besides)


def make_storage(policy: Policy, models: Collection[nn.Module]) -> Storage:
    """Returns how `policy` stores half parameters and their optimizer's state."""
    if policy.master is None:
        return Storage(policy, models)
    return (RestStorage if policy.params is torch.bfloat16 else FullStorage)(policy, models)


def wide_copy(storage: Storage, param: Tensor) -> Tensor:
    """Returns the float32 values of a full parameter or of a DTensor, a new tensor."""
    wide, beside = torch.empty_like(param, dtype=torch.float32), storage.beside(param)
    out, weight = flat(local(wide)), dense(local(param))
    rests = [] if beside is None else [flat(alike(local(beside), weight))]
    values = storage.read([flat(weight)], rests, row_of(out), row_of(torch.empty_like(out)))
    if values.parts[0] is not out:
        out.copy_(values.parts[0])
    return wide
