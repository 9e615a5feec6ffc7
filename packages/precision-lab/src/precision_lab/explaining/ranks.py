"""Which rank went wrong first, by what each has written for itself: no rank asks another one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

ALONE, ANOTHER, TOGETHER = "one rank alone", "another rank", "all ranks at once"
_ORDER = {"loss": 0, "spike": 0, "gradients": 1, "skips": 2}
"""Of alarms within a step: a loss is a rank's own, gradients have been averaged over ranks."""
_FOLLOWS = 3


@dataclass(frozen=True)
class First:
    """The first of several ranks that went wrong."""

    kind: str  # "one rank alone", "all ranks at once", or "some ranks"
    rank: int
    step: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return asdict(self)


def order_of(alarm: Mapping[str, Any]) -> tuple[float, int]:
    """Returns what alarms of several ranks are sorted by: the earlier one is less."""
    explained = alarm.get("explanation") or {}
    order = _FOLLOWS if explained.get("kind") == ANOTHER else _ORDER.get(str(alarm.get("alarm")), _FOLLOWS)
    try:
        return float(alarm.get("step", math.inf)), order
    except (TypeError, ValueError):
        return math.inf, order


def first_rank(alarms: Mapping[int, Iterable[Mapping[str, Any]]], ranks: int) -> First | None:
    """Returns which rank was first, of rank -> its alarms; None where there is only one rank, or no alarm."""
    earliest = {rank: min(each, key=order_of) for rank, given in alarms.items() if (each := list(given))}
    if ranks < 2 or not earliest:
        return None
    least = min(map(order_of, earliest.values()))
    first = sorted(rank for rank, each in earliest.items() if order_of(each) == least)
    alarm = earliest[first[0]]
    step, what = int(alarm.get("step", 0)), str(alarm.get("text") or alarm.get("alarm"))
    if least[1] == _FOLLOWS:
        text = f"all that were replayed had finite gradients of their own in step {step}: the sum over ranks overflowed"
        return First("overflow over ranks", first[0], step, text + ", or a rank that wrote no file was first.")
    if len(first) == 1:
        own = "its own batch is to blame, or what it alone holds" if least[1] < _ORDER["skips"] else "it was first"
        text = f"rank {first[0]} of {ranks} alone went wrong first, in step {step} ({what}): {own}."
        return First(ALONE, first[0], step, text)
    if len(first) == ranks:
        text = f"all {ranks} ranks went wrong in the same step {step} ({what}): it is no single rank's batch."
        return First(TOGETHER, first[0], step, text)
    names = f"{', '.join(map(str, first[:-1]))} and {first[-1]}"
    return First("some ranks", first[0], step, f"ranks {names} of {ranks} went wrong first, in step {step} ({what}).")
