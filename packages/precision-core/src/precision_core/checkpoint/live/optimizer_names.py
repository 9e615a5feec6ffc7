"""Optimizer state by name: matches the parameters and groups of a saved and a live optimizer, in any order.

torch numbers a saved optimizer's parameters by position. Names are known if the optimizer was made over
`named_parameters()`, or if `state` holds the model beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import LBFGS, Optimizer

from precision_core.checkpoint.live.state import plain_name, stateful_objects
from precision_core.checkpoint.tree import KeyPath

Names = Sequence[Sequence[tuple[KeyPath, str]]]
"""For each parameter, in the order of the groups: (key path of its module, name in it); several if it is tied."""
_Tags = list[tuple[Any, ...]]


def param_names(tree: dict[str, Any]) -> dict[KeyPath, Names]:
    """Returns the names of each optimizer's parameters that modules in `tree` have, by the optimizer's key path."""
    names: dict[int, list[tuple[KeyPath, str]]] = {}
    for path, live in stateful_objects(tree):
        if isinstance(live, nn.Module):
            for name, param in live.named_parameters(remove_duplicate=False):
                names.setdefault(id(param), []).append((path, plain_name(name)))
    return {
        path: [tuple(names.get(id(param), ())) for group in live.param_groups for param in group["params"]]
        for path, live in stateful_objects(tree)
        if isinstance(live, Optimizer)
    }


class Match(NamedTuple):
    """For each live parameter and group its position in the checkpoint, or the problem."""

    params: list[int]
    groups: list[int]
    note: str = ""
    problem: str = ""

    @property
    def in_order(self) -> bool:
        return all(order == sorted(order) for order in (self.params, self.groups))


def match(optimizer: Optimizer, saved: dict[str, Any], theirs: Names | None, mine: Names) -> Match:
    """Matches live to saved parameters: by name, else by position. `theirs` is None for checkpoints without names.

    The groups must have equal sizes, in any order. Raises KeyError, TypeError, ... for an invalid optimizer state.
    """
    groups, live_groups = saved["param_groups"], optimizer.param_groups
    count = sum(len(group["params"]) for group in groups)
    by_position = Match(list(range(count)), list(range(len(groups))))
    given = _tags(groups, theirs or [()] * count), _tags(live_groups, mine)
    differ = False
    for saved_tags, live_tags in zip(*given, strict=True):
        if any(saved_tags) and any(live_tags):
            order = _by_tags(saved_tags, live_tags)
            if order is not None:
                all_named = all(live_tags)
                note = "" if all_named else "of parameters without names by position"
                return _in_groups(optimizer, saved, order)._replace(note=note)
            differ = True
    known = [any(map(any, side)) for side in given]
    if not any(known):
        return by_position._replace(note="by position, as the parameters have no names")
    if theirs is None:
        return by_position._replace(note="by position, as the checkpoint was written by a release that saved no names")
    reason = "their names differ from those in the checkpoint"
    if not differ:
        reason = "only the checkpoint has parameter names" if known[0] else "the checkpoint has no parameter names"
    alike = _alike(optimizer, saved)
    return by_position._replace(
        note=f"by position, as {reason}",
        problem=alike
        and f"{reason}, and {alike}: their state cannot be matched. Put the model in `state` beside "
        "the optimizer, when saving and when loading, or make the optimizer over model.named_parameters(). "
        "strict=False loads by position",
    )


def _tags(groups: Sequence[dict[str, Any]], names: Names) -> tuple[_Tags, _Tags]:
    """Returns the tags of each parameter, twice: (module key path, name) pairs, and names alone."""
    alone: list[tuple[str, ...]] = []
    for group in groups:
        texts = group.get("param_names") or [None] * len(group["params"])
        start = len(alone)
        for number, text in enumerate(texts):
            alone.append(tuple({name: None for _, name in names[start + number]}) if text is None else (text,))
    counts = Counter(name for texts in alone for name in texts)  # a name of several parameters identifies none
    return [tuple(map(tuple, each)) for each in names], [
        tuple(name for name in texts if counts[name] == 1) for texts in alone
    ]


def _by_tags(saved: _Tags, live: _Tags) -> list[int] | None:
    """Returns the position in `saved` of each of `live`; without tags by position, if both have equally many."""
    positions = {tag: position for position, tags in enumerate(saved) for tag in tags}
    rest = [position for position, tags in enumerate(saved) if not tags]
    if sum(not tags for tags in live) != len(rest):
        return None
    order = [next((positions[tag] for tag in tags if tag in positions), None) if tags else rest.pop(0) for tags in live]
    found = [position for position in order if position is not None]
    return found if len(set(found)) == len(saved) else None


def _in_groups(optimizer: Optimizer, saved: dict[str, Any], order: list[int]) -> Match:
    """Returns the match for the parameters' `order`, with each live group's group in the checkpoint."""
    owners = [number for number, group in enumerate(saved["param_groups"]) for _ in group["params"]]
    empty = [number for number, group in enumerate(saved["param_groups"]) if not group["params"]]
    sizes = Counter(owners)
    groups, start = [], 0
    for number, group in enumerate(optimizer.param_groups):
        size = len(group["params"])
        found = {owners[position] for position in order[start : start + size]} or {empty.pop(0)}
        start += size
        if len(found) != 1 or size != sizes[min(found)]:
            problem = f"by name, its group {number} has parameters of the checkpoint's groups {sorted(found)}"
            return Match(order, [], problem=f"{problem}: make its groups as in the run that saved")
        groups.append(min(found))
    found_match = Match(order, groups)
    if isinstance(optimizer, LBFGS) and saved["state"] and not found_match.in_order:
        problem = "its parameters are in another order than in the checkpoint, and LBFGS has one state for all of them"
        return found_match._replace(problem=f"{problem}: pass the parameters in the checkpoint's order")
    return found_match


def _alike(optimizer: Optimizer, saved: dict[str, Any]) -> str:
    """Returns why only positions tell parameters or groups apart (equal shapes or sizes), or an empty string."""
    shapes = Counter(tuple(param.shape) for group in optimizer.param_groups for param in group["params"])
    shape, count = shapes.most_common(1)[0] if shapes else ((), 0)
    if any(saved["state"].values()) and count > 1:
        return f"{count} of them have the shape {shape}"
    groups = saved["param_groups"]
    options = [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups]
    sizes = [len(group["params"]) for group in groups]
    for number, size in enumerate(sizes):
        other = sizes.index(size)
        if other < number and options[other] != options[number]:
            return f"its groups {other} and {number} have {size} each and other options"
    return ""
