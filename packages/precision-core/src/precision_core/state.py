"""State: from the user's dict of live objects to plain values and back.

Objects with `state_dict` (modules, optimizers, schedulers, the plugin, ...) are saved as what it returns and restored
in place by `load_state_dict`; anything else is a plain value. Dicts may nest. A compiled module's keys are saved as
the plain module's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from precision_core.checkpoint import CheckpointError
from precision_core.dtypes import FLOAT_DTYPES

_COMPILED = "_orig_mod."


def collect(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns `tree` with every stateful object replaced by its state."""
    return {key: _state_of(value) for key, value in tree.items()}


def restore(tree: dict[str, Any], content: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    """Brings the objects in `tree` to the states in `content`, and its plain values to those there.

    Everything is compared first. `strict` wants every key of `tree` in `content`, and modules to have the same keys.
    Returns what of `content` has no key in `tree`.

    Raises:
        CheckpointError: `content` does not fit; nothing was changed.
    """
    problems = list(_differences(tree, content, "", strict))
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError("the checkpoint does not fit:\n  " + "\n  ".join(problems[:10]) + more)
    _apply(tree, content, strict)
    return {key: value for key, value in content.items() if key not in tree}


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _state_of(value: Any) -> Any:
    if isinstance(value, nn.Module):
        state = value.state_dict()
        for key in [key for key in state if _COMPILED in key]:
            state[key.replace(_COMPILED, "")] = state.pop(key)
        return state
    if _is_stateful(value):
        return value.state_dict()
    return collect(value) if type(value) is dict else value


def _differences(tree: dict[str, Any], content: dict[str, Any], prefix: str, strict: bool) -> Iterator[str]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in content:
            if strict:
                yield f"{name}: missing in the checkpoint, which has {sorted(map(str, content))[:10]}"
            continue
        saved = content[key]
        if type(value) is dict:
            if isinstance(saved, dict):
                yield from _differences(value, saved, f"{name}.", strict)
            else:
                yield f"{name}: a {type(saved).__name__} in the checkpoint, a dict is expected"
        elif _is_stateful(value) and not isinstance(saved, dict):
            yield f"{name}: a {type(saved).__name__} in the checkpoint, a {type(value).__name__}'s state is expected"
        elif isinstance(value, nn.Module):
            yield from _module_differences(value, saved, name, strict)
        elif isinstance(value, Optimizer):
            yield from _optimizer_differences(value, saved, name)


def _module_differences(module: nn.Module, saved: dict[str, Any], name: str, strict: bool) -> Iterator[str]:
    if any(child._load_state_dict_pre_hooks for child in module.modules()):
        return  # the hooks may rename or reshape; only they know what fits
    live = _state_of(module)
    if strict:
        yield from (f"{name}.{key}: missing in the checkpoint" for key in live if key not in saved)
        yield from (f"{name}.{key}: unexpected in the checkpoint" for key in saved if key not in live)
    for key in live.keys() & saved.keys():
        mine, theirs = live[key], saved[key]
        if not isinstance(mine, Tensor) or is_lazy(mine):
            continue
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
    if not {saved, live} <= FLOAT_DTYPES:
        return saved is not live
    return torch.promote_types(saved, live) is not live


def _optimizer_differences(optimizer: Optimizer, saved: dict[str, Any], name: str) -> Iterator[str]:
    try:
        theirs = [len(group["params"]) for group in saved["param_groups"]]
    except (KeyError, TypeError):
        yield f"{name}: the checkpoint holds no state of an optimizer"
        return
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if mine != theirs:
        yield f"{name}: parameter groups of {theirs} parameters in the checkpoint, {mine} in the optimizer"


def _apply(tree: dict[str, Any], content: dict[str, Any], strict: bool) -> None:
    for key, value in tree.items():
        if key not in content:
            continue
        saved = content[key]
        if isinstance(value, nn.Module):
            names = {own.replace(_COMPILED, ""): own for own in value.state_dict()}
            value.load_state_dict({names.get(name, name): each for name, each in saved.items()}, strict=strict)
        elif _is_stateful(value):
            value.load_state_dict(saved)
        elif type(value) is dict:
            _apply(value, saved, strict)
        else:
            tree[key] = saved
