"""Optimizer state with the dtypes that it was saved in.

torch's `Optimizer.load_state_dict` casts every floating state except "step" to its parameter's dtype: a float32 moment
under a bfloat16 parameter comes back rounded. Here state that had its parameter's dtype when it was saved follows the
parameter, and any other keeps its own. Everything else stays torch's: hooks, param_groups, `__setstate__`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_core.checkpoint.shards import copy_of, is_made_of_parts, is_sharded
from precision_core.policy.casting import map_tensors
from precision_core.policy.dtypes import FLOAT_DTYPES


def wanted_dtype(value: Tensor, param: Tensor, saved_param: torch.dtype | None) -> torch.dtype:
    """Returns the dtype that state is loaded in; `saved_param` is what its parameter had then, None: nobody knows."""
    if value.dtype not in FLOAT_DTYPES and not value.is_complex():
        return value.dtype
    if saved_param is None:  # at least nothing is rounded
        return torch.promote_types(value.dtype, param.dtype)
    return param.dtype if value.dtype is saved_param else value.dtype


def prepare(optimizer: Optimizer, saved: dict[str, Any], dtypes: list[torch.dtype] | None) -> Callable[[], None]:
    """Returns what loads `saved`; the memory that it needs is taken now, so that it does not run out half-way.

    Values go into the live tensors where these have the shape, dtype and device, else into new ones. `dtypes` are those
    of the parameters when they were saved, in the order of the groups.
    """
    places: dict[Tensor, Tensor] = {}
    for key, tensor, param, live, dtype in _state_tensors(optimizer, saved, dtypes):
        places[tensor] = _place(key, tensor, param, live, dtype)

    def settle(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        settled: dict[Tensor, Tensor] = {}
        for key, tensor, param, live, dtype in _state_tensors(optimizer, state_dict, dtypes):
            place = places.get(tensor)  # None: a hook of the user's made it
            if place is None:
                place = _place(key, tensor, param, live, dtype)
            filled = place if is_made_of_parts(place) else place.copy_(tensor)  # those have the values already
            settled[tensor] = _Placed.around(filled, may_be_cast=key == "step")
        return {**state_dict, "state": map_tensors(state_dict["state"], lambda tensor: _found(settled, tensor))}

    def load() -> None:
        handle = optimizer.register_load_state_dict_pre_hook(settle)  # the last: it is given what the user's return
        try:
            with torch.no_grad():
                optimizer.load_state_dict(saved)
        finally:
            handle.remove()

    return load


def _found(settled: dict[Tensor, Tensor], tensor: Tensor) -> Tensor:
    return settled[tensor] if tensor in settled else tensor.clone()  # of no parameter: torch takes it as it is


class _Placed(Tensor):
    """Stands for a tensor that is where it belongs: `to`, by which torch's `load_state_dict` casts, gives it back."""

    placed: Tensor

    @classmethod
    def around(cls, tensor: Tensor, may_be_cast: bool) -> Tensor:
        if may_be_cast or not (type(tensor) is Tensor or is_sharded(tensor) or is_made_of_parts(tensor)):
            return tensor
        wrapper = torch.empty(0).as_subclass(cls)  # of its own, as a DTensor is no subclass's
        wrapper.placed = tensor
        return wrapper

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.placed


def indexed_params(optimizer: Optimizer, saved: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yields the optimizer's parameters under the indices that they have in a saved state, by their order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    yield from zip(indices, params, strict=True)


_StateTensor = tuple[Any, Tensor, Tensor, Any, "torch.dtype | None"]


def _state_tensors(
    optimizer: Optimizer, saved: dict[str, Any], dtypes: list[torch.dtype] | None
) -> Iterator[_StateTensor]:
    """Yields each tensor of the saved state: its key, itself, its parameter, the live value, the parameter's dtype."""
    for number, (index, param) in enumerate(indexed_params(optimizer, saved)):
        live = optimizer.state.get(param, {})
        for key, value in saved["state"].get(index, {}).items():
            found: list[Tensor] = []
            map_tensors(value, lambda tensor, found=found: found.append(tensor) or tensor)  # type: ignore[misc]
            for tensor in found:
                yield key, tensor, param, live.get(key), dtypes[number] if dtypes else None


def _place(key: Any, tensor: Tensor, param: Tensor, live: Any, saved_param: torch.dtype | None) -> Tensor:
    """Returns the tensor, live or new, that the values of `tensor` go into."""
    dtype, device = wanted_dtype(tensor, param, saved_param), param.device
    if key == "step":  # torch's own rule: the host counts, and load_state_dict moves it where the device does
        dtype, device = tensor.dtype, tensor.device
    if is_sharded(tensor):
        if type(live) is type(tensor) and live.dtype is dtype and _sharding(live) == _sharding(tensor):
            return live
        return torch.empty_like(tensor, dtype=dtype, device=device)
    if is_made_of_parts(tensor):
        return copy_of(tensor, device)
    if tensor.layout is not torch.strided or type(tensor) is not Tensor:
        return copy.deepcopy(tensor).to(device, dtype)
    if type(live) is Tensor and (live.shape, live.dtype, live.device) == (tensor.shape, dtype, device):
        return live
    return torch.empty_like(tensor, dtype=dtype, device=device)


def _sharding(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.device_mesh, tensor.placements
