"""Undoes loading: each kind of object gets its values from before, bit for bit.

Each function takes a snapshot and returns a function that restores it. Values of tensors are kept in CPU memory, and
copied back into the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from precision_core.checkpoint.live.own_way import overrides
from precision_core.checkpoint.live.transaction import Undo
from precision_core.checkpoint.shards import copy_of, is_sharded, is_wrapper_subclass
from precision_core.data.loader import DeviceLoader
from precision_core.policy.casting import map_tensors
from precision_core.precision.base import Precision


def undo_of(live: Any) -> Undo:
    """Returns a function that restores a stateful object's present state."""
    for kind, make in _KINDS.items():
        if isinstance(live, kind):
            return make(live)
    return _undo_custom(live)


def undo_groups(optimizer: Optimizer) -> Undo:
    """Returns a function that restores an optimizer's param_groups, which a scheduler's loading may change."""
    groups = optimizer.param_groups
    before = [
        (group, dict(group), list(group["params"]), _Values([group[key] for key in group if key != "params"]))
        for group in groups
    ]

    def undo() -> None:
        groups[:] = [group for group, *_ in before]
        optimizer.param_groups = groups
        for group, options, params, values in before:
            group.clear()
            group.update(options)
            group["params"][:] = params
            values.restore()

    return undo


def is_copied_into(value: Any) -> bool:
    """Whether `value` is a plain or sharded tensor that `copy_` overwrites fully, without custom code."""
    kinds = (Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter, nn.UninitializedBuffer)
    known = type(value) in kinds or (isinstance(value, Tensor) and is_sharded(value))
    return known and (is_lazy(value) or _is_writable(value))


def _is_writable(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return True
    is_expanded = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not is_expanded and not tensor.is_inference()


class _Values:
    """The values of the tensors in a tree, on the CPU."""

    def __init__(self, tree: Any) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        map_tensors(tree, self._keep)

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor not in self.copies and not is_lazy(tensor) and _is_writable(tensor):  # no load can change the others
            wraps = is_wrapper_subclass(tensor)
            self.copies[tensor] = copy_of(tensor) if wraps else tensor.detach().to("cpu", copy=True)
        return tensor

    def in_copy_of(self, tree: Any) -> Any:
        """Returns a deep copy of `tree` that holds the kept values."""
        return copy.deepcopy(tree, {id(tensor): value for tensor, value in self.copies.items()})

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self.copies.items():
            if is_wrapper_subclass(tensor):
                for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                    getattr(tensor, name).copy_(getattr(value, name))
            elif (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
                tensor.data = value.to(tensor.device)
            else:
                tensor.copy_(value)


def _attributes(live: Any) -> Undo:
    """Returns a function that restores an object's attributes, to the same objects."""
    attributes: dict[str, Any] = getattr(live, "__dict__", {})
    before = dict(attributes)

    def undo() -> None:
        attributes.clear()
        attributes.update(before)

    return undo


def _undo_custom(live: Any) -> Undo:
    state = live.state_dict()
    values, attributes = _Values(state), _attributes(live)
    snapshot = values.in_copy_of(state)

    def undo() -> None:
        try:
            live.load_state_dict(snapshot)  # for changes within lists and the like
        except BaseException:  # it may be what raised
            if not hasattr(live, "__dict__"):  # else its attributes are restored
                raise
        finally:
            attributes()
            values.restore()

    return undo


def _undo_module(module: nn.Module) -> Undo:
    children = list(module.modules())
    dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for child in children:
        dicts += [(child._parameters, dict(child._parameters)), (child._buffers, dict(child._buffers))]
    values = _Values([before for _, before in dicts])
    extras = [(child, _Values(state).in_copy_of(state)) for child, state in map(_extra_state, children) if state]
    attributes = [_attributes(child) for child in children]

    def undo() -> None:
        for child, (state,) in extras:
            child.set_extra_state(state)
        for restore in attributes:
            restore()
        for mine, before in dicts:
            mine.clear()
            mine.update(before)
        values.restore()

    return undo


def _extra_state(module: nn.Module) -> tuple[nn.Module, tuple[Any, ...]]:
    has_own = type(module).get_extra_state is not nn.Module.get_extra_state
    return module, (module.get_extra_state(),) if has_own else ()


def _undo_optimizer(optimizer: Optimizer) -> Undo:
    state, entries = optimizer.state, {param: _shallow(entry) for param, entry in optimizer.state.items()}
    values, groups, attributes = _Values(list(entries.values())), undo_groups(optimizer), _attributes(optimizer)
    more = _undo_custom(optimizer) if overrides(optimizer, "load_state_dict") else None

    def undo() -> None:
        try:
            if more is not None:
                more()
        finally:
            attributes()
            groups()
            state.clear()
            state.update({param: _shallow(entry) for param, entry in entries.items()})
            values.restore()

    return undo


def _shallow(entry: Any) -> Any:
    return dict(entry) if type(entry) is dict else entry


def _undo_precision(precision: Precision) -> Undo:
    state, report = copy.deepcopy(precision.state_dict()), precision.report

    def undo() -> None:
        precision.load_state_dict(state)
        precision.report = report

    return undo


_KINDS: dict[type, Callable[[Any], Undo]] = {
    nn.Module: _undo_module,
    Optimizer: _undo_optimizer,
    DeviceLoader: DeviceLoader.undo_load,
    Precision: _undo_precision,
}
