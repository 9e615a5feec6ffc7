"""Restores the live objects from a checkpoint's content, all or nothing.

Custom objects and user hooks (schedulers, samplers, modules and optimizers with hooks, ...) load first: each has a
snapshot, and all go back to theirs if one raises. Plain modules and optimizers follow without a snapshot: they were
compared and their memory is allocated, so that only copying is left. Plain values come last.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_core.checkpoint.live import left_out
from precision_core.checkpoint.live.compare import Dtypes
from precision_core.checkpoint.live.optimizer_state import StateDtype, parameters_own, prepare
from precision_core.checkpoint.live.own_way import loads_its_own_way, overrides, own_prefixes
from precision_core.checkpoint.live.state import is_plain, is_stateful, named_as, saved_objects
from precision_core.checkpoint.live.transaction import Step, Transaction
from precision_core.checkpoint.live.undo import is_copied_into, undo_groups, undo_of
from precision_core.checkpoint.shards import deep_copied


def restore(
    tree: dict[str, Any],
    content: dict[str, Any],
    *,
    strict: bool,
    dtypes: Dtypes | None = None,
    state_dtype: StateDtype = parameters_own,
    run_steps: Iterable[Step] = (),
    agree: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda _: None,
    origin: str = "the checkpoint",
) -> dict[str, Any]:
    """Loads the states in `content` into the objects in `tree`, and its plain values; call `check_matches` first.

    Returns a copy of the plain values in `content` that `tree` has no key for. `run_steps` come after the custom
    objects. `agree` is called, and may raise, before anything without a snapshot is written. Before that, without
    `strict`, `warn` is called with a text for each object with missing or unexpected keys; it may raise too.

    Raises:
        CheckpointError: an object's own loading raised; names the object. All objects have their values from before.
    """
    parts = {path: live for path, live, _ in saved_objects(tree, content)}
    saved = {path: state for path, _, state in saved_objects(tree, content)}
    custom = {path: live for path, live in parts.items() if _needs_snapshot(live)}
    results: dict[Any, Any] = {}  # of modules' load_state_dict
    dtypes = dtypes or {}
    with Transaction(origin) as transaction:
        for step, _, undo in run_steps:
            transaction.undo_by(step, undo)
        for path, live in parts.items():
            transaction.at(path)
            if isinstance(live, Optimizer):
                transaction.undo_by(path, undo_groups(live))
        for path, live in custom.items():
            transaction.at(path)
            transaction.undo_by(path, undo_of(live))
        for path, live in custom.items():
            transaction.at(path)
            load = _loader(live, _independent_where_needed(live, saved[path]), strict, dtypes.get(path), state_dtype)
            results[path] = load()
        for step, act, _ in run_steps:
            transaction.at(step)
            act()
        loads = {}
        for path, live in parts.items():
            transaction.at(path)
            if path not in custom:
                loads[path] = _loader(live, saved[path], strict, dtypes.get(path), state_dtype)
        transaction.at("the plain values")
        plain = _plain_values(tree, content, {})
        if not strict:
            transaction.at("what the checkpoint lacks")
            _warn_of_left_out(tree, content, parts, saved, results, warn)
        agree()
        transaction.commit()
        for path, load in loads.items():
            transaction.at(path)
            load()
        return _write_plain(tree, plain)


def _needs_snapshot(live: Any) -> bool:
    """Whether loading `live` may raise, or change more than what copying changes."""
    if isinstance(live, nn.Module):
        own = own_prefixes(live, loads_its_own_way)
        return bool(own) or not all(map(is_copied_into, live.state_dict().values()))
    return loads_its_own_way(live)


def _loader(
    live: Any, saved: Any, strict: bool, dtypes: list[torch.dtype] | None, state_dtype: StateDtype
) -> Callable[[], Any]:
    """Returns a function that loads `saved` into `live`."""
    if isinstance(live, nn.Module):
        return functools.partial(live.load_state_dict, named_as(live, saved), strict=strict)
    if isinstance(live, Optimizer) and not overrides(live, "load_state_dict"):
        return prepare(live, saved, dtypes, state_dtype)
    return functools.partial(live.load_state_dict, saved)


def _warn_of_left_out(
    tree: dict[str, Any],
    content: dict[str, Any],
    parts: dict[Any, Any],
    saved: dict[Any, Any],
    results: dict[Any, Any],
    warn: Callable[[str], None],
) -> None:
    texts = list(left_out.absent(tree, content))
    for path, live in parts.items():
        result = results.get(path)
        is_known = path not in results or hasattr(result, "missing_keys")  # else its own loading does not tell
        if isinstance(live, nn.Module) and is_known:
            texts.append(left_out.of_module(path, live, saved[path], result))
    for text in filter(None, texts):
        warn(text)


def _independent_where_needed(live: Any, saved: Any) -> Any:
    """Returns `saved`, with what custom objects and user hooks may keep copied out of the memory-mapped file."""
    if not isinstance(live, nn.Module):
        return deep_copied(saved)
    own = own_prefixes(live, loads_its_own_way)
    kept = {name: deep_copied(value) if name.startswith(own) else value for name, value in saved.items()}
    state = OrderedDict(kept)
    state._metadata = getattr(saved, "_metadata", {})  # type: ignore[attr-defined]
    return state


# ---------------------------------------------------------------- plain values


def _plain_values(tree: dict[str, Any], content: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Returns a copy of `content` without the states of the objects in `tree`."""
    plain = {}
    for key, value in content.items():
        mine = tree.get(key)
        if type(mine) is dict:
            plain[key] = _plain_values(mine, value, memo)
        elif not is_stateful(mine):
            plain[key] = deep_copied(value, memo)
    return plain


def _write_plain(tree: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Writes the values of `plain` into `tree` in place, and returns those that `tree` has no key for."""
    rest = {key: value for key, value in plain.items() if key not in tree}
    for key, value in plain.items():
        mine = tree.get(key)
        if type(mine) is dict:
            left = _write_plain(mine, value)
            if is_plain(mine):
                mine.update(left)
            elif left:
                rest[key] = left
        elif key in tree:
            tree[key] = value
    return rest
