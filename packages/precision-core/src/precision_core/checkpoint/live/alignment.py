"""Alignment: reorders a checkpoint's optimizer states, and their schedulers', to match the live optimizers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from precision_core.checkpoint.live.compare import Dtypes
from precision_core.checkpoint.live.optimizer_names import Match, match, param_names
from precision_core.checkpoint.live.state import saved_objects
from precision_core.checkpoint.tree import KeyPath

_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas")
"""Lists of torch's schedulers with one entry per parameter group."""


class Aligned(NamedTuple):
    """The reordered content and dtypes, problems (why an optimizer cannot be reordered), and notes for the report."""

    content: dict[str, Any]
    dtypes: Dtypes
    problems: list[str]
    notes: list[str]


def aligned(tree: dict[str, Any], content: dict[str, Any], header: dict[str, Any], *, strict: bool) -> Aligned:
    """Returns `content` with the state of each optimizer in `tree` in the order of that optimizer's parameters.

    Without `strict`, parameters that cannot be matched by name are matched by position. Tensors are not copied.
    """
    dtypes = dict(header.get("param_dtypes") or {})
    theirs, mine = header.get("param_names"), param_names(tree)
    result = Aligned(content, dtypes, [], [])
    for path, live, saved in saved_objects(tree, content):
        if not isinstance(live, Optimizer):
            continue
        name = ".".join(map(str, path))
        found = _match(live, saved, None if theirs is None else theirs.get(path, ()), mine[path])
        if found is None:
            continue
        if found.problem and (strict or not found.note):
            result.problems.append(f"{name}: {found.problem}")
            continue
        if found.note and any(saved["state"].values()):
            result.notes.append(f"{name}: state was loaded {found.note}")
        if found.in_order:
            continue
        result = result._replace(content=replaced(result.content, path, _reordered(live, saved, found)))
        if path in dtypes:
            dtypes[path] = [dtypes[path][position] for position in found.params]
        if found.groups != sorted(found.groups):
            result = _reorder_schedulers(result, tree, live, found.groups)
    return result


def replaced(content: Any, keys: KeyPath, value: Any) -> Any:
    """Returns `content` with `value` at `keys`; unchanged if there is nothing at `keys`."""
    if not keys:
        return value
    if not isinstance(content, dict) or keys[0] not in content:
        return content
    return {**content, keys[0]: replaced(content[keys[0]], keys[1:], value)}


def _match(optimizer: Optimizer, saved: Any, theirs: Any, mine: Any) -> Match | None:
    """Returns the match; None where the comparison that follows reports the problem, or only the optimizer can."""
    try:
        counts = [
            sorted(len(group["params"]) for group in groups)
            for groups in (saved["param_groups"], optimizer.param_groups)
        ]
        if counts[0] != counts[1]:
            return None
        names = theirs if theirs is None or len(theirs) == sum(counts[0]) else [()] * sum(counts[0])
        return match(optimizer, saved, names, mine)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _reordered(optimizer: Optimizer, saved: dict[str, Any], found: Match) -> dict[str, Any]:
    """Returns the saved state as the live optimizer would have saved it."""
    groups = saved["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    names = [name for group in groups for name in group.get("param_names") or [None] * len(group["params"])]
    state = {key: value for key, value in saved["state"].items() if key not in set(indices)}
    new_groups, position = [], 0
    for live, number in zip(optimizer.param_groups, found.groups, strict=True):
        group = {**groups[number], "params": list(range(position, position + len(live["params"])))}
        if "param_names" in group:
            kept = [names[found.params[each]] for each in group["params"]]
            group["param_names"] = list(live.get("param_names") or kept)
        new_groups.append(group)
        position += len(live["params"])
    for position, theirs in enumerate(found.params):
        if indices[theirs] in saved["state"]:
            state[position] = saved["state"][indices[theirs]]
    return {**saved, "state": state, "param_groups": new_groups}


def _reorder_schedulers(result: Aligned, tree: dict[str, Any], optimizer: Optimizer, groups: list[int]) -> Aligned:
    for path, live, saved in saved_objects(tree, result.content):
        if getattr(live, "optimizer", None) is not optimizer:
            continue
        if not isinstance(live, LRScheduler) or not type(live).__module__.startswith("torch."):
            name = ".".join(map(str, path))
            result.problems.append(
                f"{name}: the optimizer's groups are in another order than in the checkpoint, and a "
                f"{type(live).__name__} may keep values in their order: make the groups in the checkpoint's order"
            )
            continue
        result = result._replace(content=replaced(result.content, path, _scheduler_reordered(saved, groups)))
    return result


def _scheduler_reordered(state: Any, groups: list[int]) -> Any:
    if not isinstance(state, dict):
        return state
    reordered = dict(state)
    for key, value in state.items():
        if key in _PER_GROUP and isinstance(value, (list, tuple)) and len(value) == len(groups):
            reordered[key] = type(value)([value[number] for number in groups])
        elif key == "_schedulers":
            reordered[key] = [_scheduler_reordered(each, groups) for each in value]
    return reordered
