"""Loading: an optimizer's state dict has what is stored beside the weights, and loads with the dtypes it is kept in.

torch's `Optimizer.load_state_dict` casts all state but "step" to its parameter's dtype: float32 moments and the rest of
a master would come back as bfloat16.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from precision_core.precision.update.storage import Storage


class Loading:
    """Hooks of one optimizer."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._given: dict[Any, dict[str, Any]] = {}

    def attach(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Registers them, and shows in the optimizer's state what is stored beside its weights."""
        self._show(optimizer)
        for param, state in optimizer.state.items():
            if isinstance(param, Tensor) and param.dtype is self._storage.params:
                _cast_moments(self._storage, param, state, state)
        return [
            optimizer.register_state_dict_pre_hook(self._show),
            optimizer.register_load_state_dict_pre_hook(self._before, prepend=True),
            optimizer.register_load_state_dict_post_hook(self._after, prepend=True),
        ]

    def _show(self, optimizer: Optimizer) -> None:
        """Brings the state up to date with what is stored: a rest that a write made stale is gone from it."""
        key = self._storage.key
        for param in _stored(optimizer, self._storage) if key is not None else ():
            beside = self._storage.known(param)
            if beside is not None:
                optimizer.state[param][key] = beside
            elif key in optimizer.state.get(param, {}):
                del optimizer.state[param][key]

    def _before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._given = dict(state_dict.get("state", {}))
        self._indices = [index for group in state_dict["param_groups"] for index in group["params"]]

    def _after(self, optimizer: Optimizer) -> None:
        given, self._given = self._given, {}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, param in zip(self._indices, params, strict=True):
            if param.dtype is not self._storage.params:
                continue
            state = optimizer.state.get(param, {})
            _cast_moments(self._storage, param, state, given.get(index, {}))
            self._storage.take(param, state.get(self._storage.key) if self._storage.key else None)


def _cast_moments(storage: Storage, param: Tensor, state: dict[str, Any], given: dict[str, Any]) -> None:
    """Brings `state` to the dtypes it is kept in; `given` has the values before torch cast them."""
    for key, value in list(state.items()):
        source = given.get(key, value)
        if not isinstance(value, Tensor) or not isinstance(source, Tensor):
            continue
        dtype = storage.state_dtype(key, source, param) or source.dtype
        if value.dtype is not dtype:
            state[key] = source.to(param.device, dtype)


def _stored(optimizer: Optimizer, storage: Storage) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"] if param.dtype is storage.params]
