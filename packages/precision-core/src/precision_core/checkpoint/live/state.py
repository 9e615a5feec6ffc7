"""State: the user's dict of live objects, and the plain values that are saved of it.

Objects with `state_dict` (modules, optimizers, schedulers, loaders, the plugin, ...) are saved as what it returns;
anything else is a plain value. Dicts may nest. A compiled module's keys are saved as the plain module's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from precision_core.checkpoint.live.numpy_scalars import as_python
from precision_core.checkpoint.tree import KeyPath

Filter = dict[str, Any]
"""Key -> `callable(name, value) -> bool`, nested as the state is."""

_KEYS: dict[type, str] = {nn.Module: "model", Optimizer: "optimizer", LRScheduler: "scheduler"}
_COMPILED = "_orig_mod."


def collect(tree: dict[str, Any], filter: Filter | None = None) -> dict[str, Any]:
    """Returns `tree` with each stateful object replaced by its state, without the entries that `filter` rejects.

    numpy's scalars become Python's.

    Raises:
        ValueError: a dict that contains itself; a filter for a key that `tree` does not have, or not a function.
    """
    check_filter(tree, filter)
    return as_python(_collect(tree, filter or {}, "", ()))


def check_is_dict(call: str, state: Any) -> None:
    """Raises `ValueError` unless `state` is a dict; shows how to put it into one."""
    if isinstance(state, dict):
        return
    key = next((key for kind, key in _KEYS.items() if isinstance(state, kind)), "state")
    cure = (
        f'{call}(path, {{"{key}": {key}}})' if is_stateful(state) else f'{call}(path, {{"model": model, "step": step}})'
    )
    alone = f", or fabric.{call[7:]}_module(path, model) for its weights alone" if isinstance(state, nn.Module) else ""
    raise ValueError(f"{call}(path, state): state must be a dict, not {type(state).__name__}: {cure}{alone}")


def is_stateful(value: Any) -> bool:
    """Whether `value` is an object with `state_dict` and `load_state_dict`."""
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return all(map(callable, methods)) and not isinstance(value, type)


def is_plain(tree: dict[str, Any]) -> bool:
    """Whether `tree` holds no stateful object."""
    return not any(is_stateful(value) or (type(value) is dict and not is_plain(value)) for value in tree.values())


def stateful_objects(tree: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields (key path, object) for each stateful object in `tree`."""
    for key, value in tree.items():
        if type(value) is dict:
            yield from stateful_objects(value, (*path, key))
        elif is_stateful(value):
            yield (*path, key), value


def saved_objects(tree: dict[str, Any], content: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Yields (key path, object, its state in `content`) for each stateful object in `tree` that has one there."""
    for key, value in tree.items() if isinstance(content, dict) else ():
        if key in content and type(value) is dict:
            yield from saved_objects(value, content[key], (*path, key))
        elif key in content and is_stateful(value):
            yield (*path, key), value, content[key]


def state_dtypes(
    tree: dict[str, Any], state_dtype: Callable[[Tensor], torch.dtype]
) -> dict[KeyPath, list[torch.dtype]]:
    """Returns the dtypes of the moments of each optimizer's parameters, by its key path; loading chooses by them."""
    return {
        path: [state_dtype(param) for group in value.param_groups for param in group["params"]]
        for path, value in stateful_objects(tree)
        if isinstance(value, Optimizer)
    }


def check_filter(tree: dict[str, Any], filter: Filter | None, prefix: str = "") -> None:
    """Raises `ValueError` unless every key of `filter` is in `tree`, with a function, or a dict for a dict."""
    for key, choose in (filter or {}).items():
        if key not in tree:
            raise ValueError(
                f"filter[{prefix + str(key)!r}]: the state has no such key; its keys are {sorted(map(str, tree))}"
            )
        if isinstance(choose, dict) and type(tree[key]) is dict:
            check_filter(tree[key], choose, f"{prefix}{key}.")
        elif not callable(choose):
            raise ValueError(f"filter[{prefix + str(key)!r}]: expected callable(name, value) -> bool, got {choose!r}")
        elif not is_stateful(tree[key]) and type(tree[key]) is not dict:
            kind = type(tree[key]).__name__
            raise ValueError(f"filter[{prefix + str(key)!r}]: a {kind} has no entries to choose from")


def select(state: Any, choose: Callable[[str, Any], bool]) -> Any:
    """Returns a copy of `state` with the entries for which `choose(name, value)` is true; `_metadata` is kept."""
    chosen = type(state)((name, value) for name, value in state.items() if choose(name, value))
    if hasattr(state, "_metadata"):
        chosen._metadata = state._metadata
    return chosen


def _collect(tree: dict[str, Any], filter: Filter, name: str, inside: tuple[int, ...]) -> dict[str, Any]:
    if id(tree) in inside:
        raise ValueError(f"cannot save {name}: it contains itself")
    inside = (*inside, id(tree))
    content = {}
    for key, value in tree.items():
        choose = filter.get(key)
        if type(value) is dict:
            nested = choose if isinstance(choose, dict) else {}
            content[key] = _collect(value, nested, f"{name}[{key!r}]", inside)
        else:
            content[key] = state_of(value)
        if callable(choose):
            content[key] = select(content[key], choose)
    return content


def state_of(value: Any) -> Any:
    """Returns a stateful object's state dict (a module's with plain names); any other value as it is."""
    if not isinstance(value, nn.Module):
        return value.state_dict() if is_stateful(value) else value
    state = value.state_dict()
    for key in [key for key in state if _COMPILED in key]:
        state[plain_name(key)] = state.pop(key)
    metadata = getattr(state, "_metadata", {})  # modules' versions by name
    for key in [key for key in metadata if _COMPILED in f"{key}."]:
        metadata[plain_name(key)] = metadata.pop(key)
    return state


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a module by name; tied ones under each of theirs."""
    params, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {**dict(params), **dict(buffers)}


def plain_name(name: str) -> str:
    """Returns the dotted name that a module, parameter or buffer has without `torch.compile`."""
    return f"{name}.".replace(_COMPILED, "")[:-1]


def named_as(module: nn.Module, saved: dict[str, Any]) -> OrderedDict[str, Any]:
    """Returns `saved` under the live names of `module` (with those of `torch.compile`), for its `load_state_dict`."""
    live = module.state_dict()
    names = {plain_name(name): name for name in live}
    state = OrderedDict((names.get(name, name), value) for name, value in saved.items())
    versions = getattr(saved, "_metadata", {})
    state._metadata = {  # type: ignore[attr-defined]
        name: versions[plain_name(name)] for name in getattr(live, "_metadata", {}) if plain_name(name) in versions
    }
    return state
