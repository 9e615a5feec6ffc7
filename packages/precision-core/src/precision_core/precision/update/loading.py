"""Loading: an optimizer's state dict has what is stored beside the weights, and loads with the dtypes it is kept in.

torch's `Optimizer.load_state_dict` casts all state but "step" to its parameter's dtype: float32 moments and the rest of
a master would come back as bfloat16. bitsandbytes' optimizers do so too, and call no hooks when they load.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from precision_core.precision.update.storage import Storage


class Handle(Protocol):
    """What undoes a registration."""

    def remove(self) -> None:
        """Undoes it."""


class Loading:
    """Hooks of one optimizer."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._given: dict[Any, dict[str, Any]] = {}

    def attach(self, optimizer: Optimizer) -> list[Handle]:
        """Registers them, and shows in the optimizer's state what is stored beside its weights."""
        self._show(optimizer)
        for param, state in optimizer.state.items():
            if isinstance(param, Tensor) and param.dtype is self._storage.params:
                _cast_moments(self._storage, param, state, state)
        own = [] if type(optimizer).load_state_dict is Optimizer.load_state_dict else [_Around(self, optimizer)]
        return [
            *own,
            optimizer.register_state_dict_pre_hook(self._show),
            optimizer.register_load_state_dict_pre_hook(self.before, prepend=True),
            optimizer.register_load_state_dict_post_hook(self.after, prepend=True),
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

    def before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Takes note of the values before they are cast."""
        self._given = dict(state_dict.get("state", {}))
        self._indices = [index for group in state_dict["param_groups"] for index in group["params"]]

    def after(self, optimizer: Optimizer) -> None:
        """Brings what was loaded to the dtypes it is kept in. A second call in one load changes nothing."""
        given, self._given = self._given, {}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for index, param in zip(self._indices, params, strict=True):
            if param.dtype is not self._storage.params:
                continue
            state = optimizer.state.get(param, {})
            _cast_moments(self._storage, param, state, given.get(index, {}))
            self._storage.take(param, state.get(self._storage.key) if self._storage.key else None)


class _Around:
    """Has an optimizer that loads in a way of its own do what its hooks would, whether it calls them or not."""

    def __init__(self, loading: Loading, optimizer: Optimizer) -> None:
        self._attributes = vars(optimizer)
        load = optimizer.load_state_dict

        @wraps(load)
        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            loading.before(optimizer, state_dict)
            load(state_dict, *args, **kwargs)
            loading.after(optimizer)

        self._attributes["load_state_dict"] = load_state_dict

    def remove(self) -> None:
        """Leaves the class's own."""
        self._attributes.pop("load_state_dict", None)


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
