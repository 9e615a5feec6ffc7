"""Loads optimizer state with the dtypes that it was saved in.

torch's `Optimizer.load_state_dict` casts every floating state except "step" to its parameter's dtype: a float32 moment
under a bfloat16 parameter comes back rounded. Here state that was saved in the dtype of its parameter's moments gets
that of the live ones (the parameter's, or what the policy says), and any other keeps its own. All else is torch's:
hooks, param_groups, `__setstate__`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from precision_core.checkpoint.shards import copy_of, is_sharded, is_wrapper_subclass
from precision_core.policy.casting import map_tensors
from precision_core.policy.dtypes import FLOAT_DTYPES
from precision_core.precision.masters import KEYS

StateDtype = Callable[[Tensor], torch.dtype]
"""Gives the dtype that the moments of a parameter are kept in, `Precision.state_dtype`."""


def parameters_own(param: Tensor) -> torch.dtype:
    """Returns the parameter's dtype, in which torch keeps its moments."""
    return param.dtype


def wanted_dtype(key: Any, value: Tensor, mine: torch.dtype, theirs: torch.dtype | None) -> torch.dtype:
    """Returns the dtype that state is loaded in; `mine` and `theirs`: that of moments here, and when it was saved.

    `theirs` is None if it is unknown. A master weight is no moment.
    """
    if key in KEYS or (value.dtype not in FLOAT_DTYPES and not value.is_complex()):
        return value.dtype
    if theirs is None:  # at least nothing is rounded
        return torch.promote_types(value.dtype, mine)
    return mine if value.dtype is theirs else value.dtype


def prepare(
    optimizer: Optimizer,
    saved: dict[str, Any],
    dtypes: list[torch.dtype] | None,
    state_dtype: StateDtype = parameters_own,
) -> Callable[[], None]:
    """Returns a function that loads `saved`; its memory is allocated now, so that it does not run out half-way.

    Values go into live tensors of the same shape, dtype and device, else into new ones. `dtypes` are those of moments
    when they were saved, in the order of the groups; `state_dtype` gives those of moments here.
    """
    destinations: dict[Tensor, Tensor] = {}
    for key, tensor, param, live, dtype in _state_tensors(optimizer, saved, dtypes):
        destinations[tensor] = _destination(
            key, tensor, param, live, wanted_dtype(key, tensor, state_dtype(param), dtype)
        )

    def settle(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        settled: dict[Tensor, Tensor] = {}
        for key, tensor, param, live, dtype in _state_tensors(optimizer, state_dict, dtypes):
            destination = destinations.get(tensor)  # None: a user hook made it
            if destination is None:
                destination = _destination(
                    key, tensor, param, live, wanted_dtype(key, tensor, state_dtype(param), dtype)
                )
            if not is_wrapper_subclass(destination):  # those have their values already
                destination.copy_(tensor)
            settled[tensor] = _Final.wrap(destination, may_be_cast=key == "step")
        # Those without a parameter are cloned, as torch takes them as they are.
        state = map_tensors(state_dict["state"], lambda each: settled[each] if each in settled else each.clone())
        return {**state_dict, "state": state}

    def load() -> None:
        handle = optimizer.register_load_state_dict_pre_hook(settle)  # the last: it gets what user hooks return
        try:
            with torch.no_grad():
                optimizer.load_state_dict(saved)
        finally:
            handle.remove()

    return load


class _Final(Tensor):
    """Wraps a tensor that already has its final dtype and device.

    `Optimizer.load_state_dict` casts state with `Tensor.to`; overriding it prevents that cast.
    """

    tensor: Tensor

    @classmethod
    def wrap(cls, tensor: Tensor, may_be_cast: bool) -> Tensor:
        if may_be_cast or not (type(tensor) is Tensor or is_sharded(tensor) or is_wrapper_subclass(tensor)):
            return tensor
        wrapper = torch.empty(0).as_subclass(cls)  # a tensor of its own: a DTensor cannot be viewed as a subclass
        wrapper.tensor = tensor
        return wrapper

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.tensor


def indexed_params(optimizer: Optimizer, saved: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yields (index in the saved state, live parameter), in the order of the groups."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    yield from zip(indices, params, strict=True)


_StateTensor = tuple[Any, Tensor, Tensor, Any, "torch.dtype | None"]


def _state_tensors(
    optimizer: Optimizer, saved: dict[str, Any], dtypes: list[torch.dtype] | None
) -> Iterator[_StateTensor]:
    """Yields for each tensor in `saved`: key, tensor, parameter, live value, the parameter's dtype when saved."""
    for number, (index, param) in enumerate(indexed_params(optimizer, saved)):
        live = optimizer.state.get(param, {})
        for key, value in saved["state"].get(index, {}).items():
            found: list[Tensor] = []
            map_tensors(value, lambda tensor, found=found: found.append(tensor) or tensor)  # type: ignore[misc]
            for tensor in found:
                yield key, tensor, param, live.get(key), dtypes[number] if dtypes else None


def _destination(key: Any, tensor: Tensor, param: Tensor, live: Any, dtype: torch.dtype) -> Tensor:
    """Returns the live or new tensor that takes the values of `tensor`, in `dtype`."""
    device = param.device
    if key == "step":  # torch's rule: it is on the CPU, and load_state_dict moves it for fused and capturable
        dtype, device = tensor.dtype, tensor.device
    if is_sharded(tensor):
        if type(live) is type(tensor) and live.dtype is dtype and _sharding(live) == _sharding(tensor):
            return live
        return torch.empty_like(tensor, dtype=dtype, device=device)
    if is_wrapper_subclass(tensor):
        return copy_of(tensor, device)
    if tensor.layout is not torch.strided or type(tensor) is not Tensor:
        return copy.deepcopy(tensor).to(device, dtype)
    if type(live) is Tensor and (live.shape, live.dtype, live.device) == (tensor.shape, dtype, device):
        return live
    return torch.empty_like(tensor, dtype=dtype, device=device)


def _sharding(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.device_mesh, tensor.placements
