"""State: from the user's dict of live objects to plain values and back.

Objects with `state_dict` (modules, optimizers, schedulers, the plugin, ...) are saved as what it returns and restored
in place by `load_state_dict`; anything else is a plain value. Dicts may nest. A compiled module's keys are saved as
the plain module's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from precision_core.checkpoint import CheckpointError
from precision_core.dtypes import FLOAT_DTYPES

_COMPILED = "_orig_mod."
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What torch's own optimizers keep in the shape of each parameter."""


def collect(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns `tree` with every stateful object replaced by its state.

    Raises:
        ValueError: a dict that contains itself.
    """
    return _collect(tree, "", ())


def check_fits(tree: dict[str, Any], content: dict[str, Any], *, strict: bool) -> None:
    """Compares the objects in `tree` with their states in `content`, and changes nothing.

    `strict` wants every key of `tree` in `content`, modules to have the same keys, and no value to be rounded.

    Raises:
        CheckpointError: `content` does not fit; names where.
    """
    problems = list(_differences(tree, content, "", strict))
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError("the checkpoint does not fit:\n  " + "\n  ".join(problems[:10]) + more)


def restore(tree: dict[str, Any], content: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    """Brings the objects in `tree` to the states in `content`, and its plain values to those there.

    Returns what of `content` has no place in `tree`. Call `check_fits` first.
    """
    rest = {key: value for key, value in content.items() if key not in tree}
    for key, value in tree.items():
        if key not in content:
            continue
        saved = content[key]
        if isinstance(value, nn.Module):
            _load_module(value, saved, strict)
        elif _is_stateful(value):
            value.load_state_dict(saved)
        elif type(value) is dict:
            left = restore(value, saved, strict=strict)
            if _is_plain(value):
                value.update(left)
            elif left:
                rest[key] = left
        else:
            tree[key] = saved
    return rest


def _is_stateful(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return all(map(callable, methods)) and not isinstance(value, type)


def _is_plain(tree: dict[str, Any]) -> bool:
    return not any(_is_stateful(value) or (type(value) is dict and not _is_plain(value)) for value in tree.values())


def _collect(tree: dict[str, Any], name: str, inside: tuple[int, ...]) -> dict[str, Any]:
    if id(tree) in inside:
        raise ValueError(f"cannot save {name}: it contains itself")
    inside = (*inside, id(tree))
    return {
        key: _collect(value, f"{name}[{key!r}]", inside) if type(value) is dict else _state_of(value)
        for key, value in tree.items()
    }


def _state_of(value: Any) -> Any:
    if not isinstance(value, nn.Module):
        return value.state_dict() if _is_stateful(value) else value
    state = value.state_dict()
    for key in [key for key in state if _COMPILED in key]:
        state[_plain_name(key)] = state.pop(key)
    metadata = getattr(state, "_metadata", {})  # the versions of the modules in it, by their names
    for key in [key for key in metadata if _COMPILED in f"{key}."]:
        metadata[_plain_name(key)] = metadata.pop(key)
    return state


def _plain_name(name: str) -> str:
    """Returns the dotted name that a module, parameter or buffer has without `torch.compile` around any module."""
    return f"{name}.".replace(_COMPILED, "")[:-1]


def _load_module(module: nn.Module, saved: dict[str, Any], strict: bool) -> None:
    live = module.state_dict()
    names = {_plain_name(name): name for name in live}
    state = OrderedDict((names.get(name, name), value) for name, value in saved.items())
    versions = getattr(saved, "_metadata", {})
    state._metadata = {  # type: ignore[attr-defined]
        name: versions[_plain_name(name)] for name in getattr(live, "_metadata", {}) if _plain_name(name) in versions
    }
    module.load_state_dict(state, strict=strict)


# ---------------------------------------------------------------- comparing


def _differences(tree: dict[str, Any], content: dict[str, Any], prefix: str, strict: bool) -> Iterator[str]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in content:
            if strict:
                yield f"{name}: missing in the checkpoint, which has {sorted(map(str, content))[:10]}"
            continue
        saved = content[key]
        if (_is_stateful(value) or type(value) is dict) and not isinstance(saved, dict):
            expected = "dict" if type(value) is dict else f"{type(value).__name__}'s state"
            yield f"{name}: a {type(saved).__name__} in the checkpoint, a {expected} is expected"
        elif isinstance(value, nn.Module):
            yield from _module_differences(value, saved, name, strict)
        elif isinstance(value, Optimizer):
            yield from _optimizer_differences(value, saved, name, strict)
        elif type(value) is dict:
            yield from _differences(value, saved, f"{name}.", strict)


def _module_differences(module: nn.Module, saved: dict[str, Any], name: str, strict: bool) -> Iterator[str]:
    # Modules with a way of their own to load may rename or reshape; only they know what fits.
    own_way = tuple(
        f"{_plain_name(child_name)}." if _plain_name(child_name) else ""
        for child_name, child in module.named_modules()
        if child._load_state_dict_pre_hooks or not type(child)._load_from_state_dict.__module__.startswith("torch.")
    )
    live = {key: value for key, value in _state_of(module).items() if not key.startswith(own_way)}
    saved = {key: value for key, value in saved.items() if not str(key).startswith(own_way)}
    if strict:
        yield from (f"{name}.{key}: missing in the checkpoint" for key in live if key not in saved)
        yield from (f"{name}.{key}: unexpected in the checkpoint" for key in saved if key not in live)
    for key, mine in live.items():
        if key not in saved or not isinstance(mine, Tensor) or is_lazy(mine):
            continue
        theirs = saved[key]
        if not isinstance(theirs, Tensor):
            yield f"{name}.{key}: a {type(theirs).__name__} in the checkpoint, a tensor is expected"
        elif mine.shape != theirs.shape:
            yield f"{name}.{key}: shape {tuple(theirs.shape)} in the checkpoint, {tuple(mine.shape)} in the model"
        elif strict and _would_lose(theirs.dtype, mine.dtype):
            yield (
                f"{name}.{key}: {theirs.dtype} in the checkpoint, {mine.dtype} in the model; "
                "strict=False rounds the values"
            )


def _would_lose(saved: torch.dtype, live: torch.dtype) -> bool:
    if {saved, live} <= FLOAT_DTYPES or (saved.is_complex and live.is_complex):
        return torch.promote_types(saved, live) is not live
    return saved is not live


def _optimizer_differences(optimizer: Optimizer, saved: dict[str, Any], name: str, strict: bool) -> Iterator[str]:
    try:
        theirs = [len(group["params"]) for group in saved["param_groups"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        states = [saved["state"].get(index, {}) for index in indices]
    except (KeyError, TypeError, AttributeError):
        yield f"{name}: the checkpoint holds no state of an optimizer"
        return
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if mine != theirs:
        yield f"{name}: parameter groups of {theirs} parameters in the checkpoint, {mine} in the optimizer"
        return
    if not strict or not type(optimizer).__module__.startswith("torch.optim."):
        return
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        unknown, absent = saved_group.keys() - group.keys(), optimizer.defaults.keys() - saved_group.keys()
        if unknown and absent:  # one of them alone is another version of torch
            yield (
                f"{name}: the checkpoint has the options {sorted(unknown)} and not {sorted(absent)}, "
                f"so it is of another optimizer than {type(optimizer).__name__}"
            )
            return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param, state in zip(indices, params, states, strict=True):
        for key in _MOMENTS:
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape != param.shape:
                shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(param.shape)} in the optimizer"
                yield f"{name}: {key} of parameter {index} has shape {shapes}"
