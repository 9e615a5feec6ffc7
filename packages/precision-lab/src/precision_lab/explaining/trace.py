"""From a value that is not finite back to where that began, past the infinities that are meant: masks of -inf."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from precision_lab.auditing.kinds import CAST
from precision_lab.explaining.watched import BACKWARD, LOSS, Watched, Went

_CONSTANTS = frozenset(
    [
        "full",
        "full_like",
        "fill_",
        "new_full",
        "masked_fill",
        "masked_fill_",
        "scalar_tensor",
        "where",
        "masked_scatter",
        "_to_copy",
        "copy_",
    ]
)
_LARGE = 1e3
"""A constant from which on it may be meant for a mask."""
Origin = Went | str
"""An operation, or the name of what was not finite before the step: "input 0", "parameter head.weight"."""


def origin_of(tensor: Tensor, watched: Watched, masks: Collection[str], forward_was_finite: bool) -> Origin | None:
    """Returns where a tensor's values that are not finite came from; None: they are meant to be so.

    Meant are infinities (not NaN) that a constant brought: by filling, or in one of the leaves called `masks`. An
    operation that makes NaN of them is an origin. Where the forward gave finite outputs, so is none in it.
    """
    start = watched.writer(tensor)
    if start is None or isinstance(start, str):
        return None if start in masks else start
    culprits: dict[int, list[Origin]] = {}
    for went in _reached(start):
        if forward_was_finite and went.phase != BACKWARD and went.number <= watched.forward_ended:
            culprits[went.number] = []
            continue
        found: list[Origin] = []
        for parent in went.parents:
            if isinstance(parent, Went):
                found += culprits.get(parent.number, [])
            elif parent and parent not in masks:
                found.append(parent)
            elif not parent and went.phase == LOSS:  # labels, by all likelihood
                found.append(went)
        only_infinities = went.output.infs and not went.output.nans
        meant = only_infinities and (went.parents or (went.name in _CONSTANTS and _given_infinite(went)))
        if not found and not meant:
            found = [went]
        culprits[went.number] = found
    return min(culprits[start.number], key=lambda each: each.number if isinstance(each, Went) else -1, default=None)


def hidden_overflow(watched: Watched) -> Went | None:
    """Returns the first overflow of the forward whatever came of it; casts and large constants are masks'."""
    for went in watched.went:
        overflow = went.phase != BACKWARD and went.wide is not None and went.wide.finite
        meant = went.kind is CAST or any(abs(each) >= _LARGE for each in went.scalars)
        if overflow and not meant and not went.parents:
            return went
    return None


def overflow_behind(went: Went) -> Went | None:
    """Returns the overflow of the forward whose infinity an operation of backward has met; None: there is none."""
    for each in _reached(went):
        if each.phase != BACKWARD and not each.parents and each.wide is not None and each.wide.finite:
            return each
    return None


def _given_infinite(went: Went) -> bool:
    return any(abs(each) == float("inf") for each in went.scalars)


def _reached(start: Went) -> list[Went]:
    found: dict[int, Went] = {}
    waiting = [start]
    while waiting:
        went = waiting.pop()
        if went.number not in found:
            found[went.number] = went
            waiting += [each for each in went.parents if isinstance(each, Went)]
    return sorted(found.values(), key=lambda each: each.number)
