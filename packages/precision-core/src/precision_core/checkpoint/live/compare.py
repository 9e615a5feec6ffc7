"""Compares modules and optimizers with a checkpoint by keys, shapes and dtypes, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.live.optimizer_state import StateDtype, parameters_own, wanted_dtype
from precision_core.checkpoint.live.own_way import judges_for_itself, overrides, own_prefixes
from precision_core.checkpoint.live.state import is_stateful, state_of
from precision_core.checkpoint.tree import KeyPath
from precision_core.policy.dtypes import FLOAT_DTYPES

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""State of torch's optimizers that has its parameter's shape."""
Dtypes = Mapping[KeyPath, list[torch.dtype]]


def check_matches(
    tree: dict[str, Any],
    content: dict[str, Any],
    *,
    strict: bool,
    dtypes: Dtypes | None = None,
    state_dtype: StateDtype = parameters_own,
    origin: str = "the checkpoint",
) -> None:
    """Compares the objects in `tree` with their states in `content`, and changes nothing.

    `strict` requires every key of `tree` in `content`, equal keys in modules, and that no value is rounded. `dtypes`
    are those of the optimizers' parameters when they were saved; `origin` is the checkpoint's name in messages.

    Raises:
        CheckpointError: `content` does not match; names ten key paths at most.
    """
    raise_mismatches(origin, _differences(tree, content, (), strict, dtypes or {}, state_dtype))


def mismatch(saved: Tensor, live: Tensor, *, strict: bool) -> str:
    """Returns why values of `saved` cannot be copied to `live`, or an empty string; both may be on the meta device.

    Shapes must be equal. `strict` requires a live dtype that represents every saved value, the same or a wider one.
    """
    if saved.shape != live.shape:
        return f"shape {tuple(saved.shape)} in the checkpoint, {tuple(live.shape)} in the model"
    if strict and _would_lose(saved.dtype, live.dtype):
        return f"{saved.dtype} in the checkpoint, {live.dtype} in the model; strict=False rounds the values"
    return ""


def raise_mismatches(path: object, problems: Iterable[str]) -> None:
    """Raises `CheckpointError` with the first ten problems, if there are any."""
    problems = list(problems)
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{path} does not match:\n  " + "\n  ".join(problems[:10]) + more + " [checkpoint-mismatch]"
        )


def _would_lose(saved: torch.dtype, live: torch.dtype) -> bool:
    if {saved, live} <= FLOAT_DTYPES or (saved.is_complex and live.is_complex):
        return torch.promote_types(saved, live) is not live
    return saved is not live


def _differences(
    tree: Any, content: Any, path: KeyPath, strict: bool, dtypes: Dtypes, state_dtype: StateDtype
) -> Iterator[str]:
    for key, value in tree.items():
        name = ".".join(map(str, (*path, key)))
        if key not in content:
            if strict:
                yield f"{name}: missing in the checkpoint, which has {sorted(map(str, content))[:10]}"
            continue
        saved = content[key]
        if (is_stateful(value) or type(value) is dict) and not isinstance(saved, dict):
            expected = "a dict" if type(value) is dict else f"{type(value).__name__}'s state"
            yield f"{name}: {type(saved).__name__} in the checkpoint, expected {expected}"
        elif isinstance(value, nn.Module):
            yield from _module_differences(value, saved, name, strict)
        elif isinstance(value, Optimizer):
            yield from _optimizer_differences(value, saved, name, strict, dtypes.get((*path, key)), state_dtype)
        elif type(value) is dict:
            yield from _differences(value, saved, (*path, key), strict, dtypes, state_dtype)


def _module_differences(module: nn.Module, saved: dict[str, Any], name: str, strict: bool) -> Iterator[str]:
    own_way = own_prefixes(module, judges_for_itself)
    live = {key: value for key, value in state_of(module).items() if not key.startswith(own_way)}
    saved = {key: value for key, value in saved.items() if not str(key).startswith(own_way)}
    if strict:
        yield from (f"{name}.{key}: missing in the checkpoint" for key in live if key not in saved)
        yield from (f"{name}.{key}: unexpected in the checkpoint" for key in saved if key not in live)
    for key, mine in live.items():
        if key not in saved or not isinstance(mine, Tensor) or is_lazy(mine):
            continue
        theirs = saved[key]
        if not isinstance(theirs, Tensor):
            yield f"{name}.{key}: {type(theirs).__name__} in the checkpoint, expected a tensor"
        elif problem := mismatch(theirs, mine, strict=strict):
            yield f"{name}.{key}: {problem}"


def _optimizer_differences(
    optimizer: Optimizer,
    saved: dict[str, Any],
    name: str,
    strict: bool,
    dtypes: list[torch.dtype] | None,
    state_dtype: StateDtype,
) -> Iterator[str]:
    if overrides(optimizer, "load_state_dict"):
        return  # it overrides loading, and compares for itself
    try:
        theirs = [len(group["params"]) for group in saved["param_groups"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        states = [dict(saved["state"].get(index, {})) for index in indices]
    except (KeyError, TypeError, AttributeError, ValueError):
        yield f"{name}: not the state of an optimizer in the checkpoint"
        return
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if mine != theirs:
        yield f"{name}: parameter groups of {theirs} parameters in the checkpoint, {mine} in the optimizer"
        return
    if not strict:
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if type(optimizer).__module__.startswith("torch.optim."):
        of_another = _of_another(optimizer, saved, name)
        if of_another:
            yield of_another
            return
        yield from _shape_differences(params, indices, states, name)
    for number, (param, state) in enumerate(zip(params, states, strict=True)):
        for key, value in state.items():
            if key == "step" or not isinstance(value, Tensor):
                continue
            dtype = wanted_dtype(key, value, state_dtype(param), dtypes[number] if dtypes else None)
            if torch.promote_types(value.dtype, dtype) is not dtype:
                yield (
                    f"{name}: {key} of parameter {indices[number]}: {value.dtype} in the checkpoint, and the "
                    f"parameter is {param.dtype}; strict=False rounds the values"
                )


def _of_another(optimizer: Optimizer, saved: dict[str, Any], name: str) -> str | None:
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        unknown, absent = saved_group.keys() - group.keys(), optimizer.defaults.keys() - saved_group.keys()
        if unknown and absent:  # one of them alone is another version of torch
            return (
                f"{name}: the checkpoint has the options {sorted(unknown)} and not {sorted(absent)}, so another "
                f"optimizer than {type(optimizer).__name__} wrote it"
            )
    return None


def _shape_differences(params: list[Tensor], indices: list[Any], states: list[Any], name: str) -> Iterator[str]:
    for index, param, state in zip(indices, params, states, strict=True):
        for key in _MOMENTS:
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape != param.shape:
                shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(param.shape)} in the optimizer"
                yield f"{name}: {key} of parameter {index} has shape {shapes}"
