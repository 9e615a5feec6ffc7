"""Goes through what was seen in order, and says of each parameter's gradient which loss scale it carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from precision_lab.auditing.record import Event, Record

ENGINES = ("precision", "DeepSpeed")
"""Libraries whose engine owns scaling, unscaling and clipping."""
_NEAR = 0.01


@dataclass
class Carried:
    """What the gradient of one parameter carries."""

    factor: float  # its scale; 1: the true gradient
    scale: float  # what the loss of its last backward was multiplied with
    scaler: int | None  # that did so
    updates: int = 0  # of that scaler, before
    by: Event | None = None  # what unscaled it
    used: bool = False  # by a step, and not cleared since
    old: bool = False  # it has the gradient of an earlier step in it
    mixed: bool = False  # scales of several backwards differ


@dataclass
class Moment:
    """An event, and what every gradient carried before it."""

    event: Event
    carried: dict[int, Carried]
    given: set[int] = field(default_factory=set)  # ids that got a gradient since the last step with them

    def scaled(self) -> list[int]:
        """Those of the event's parameters whose gradients carry a scale."""
        return [each for each in self.event.ids if each in self.carried and self.carried[each].factor >= 2]


def replay(record: Record) -> Iterator[Moment]:
    """Yields each event that has to do with gradients; `carried` is of the moment before it."""
    carried: dict[int, Carried] = {}
    given: set[int] = set()
    updates: dict[int, int] = {}
    by_hand = hand_scales(record)
    for event in record.events:
        if event.kind in _ABOUT_GRADIENTS and event.library not in ENGINES:
            yield Moment(event, carried, given)
        if event.kind == "backward":
            known = event.scaler is not None or event.factor in by_hand
            scale = event.factor if known else 1.0
            given |= set(event.ids)
            for each in event.ids:
                _give(carried, each, each in event.fresh, scale, event.scaler, updates.get(event.scaler, 0))
        elif event.kind == "assigned":
            given |= set(event.ids)
            scale = event.factor if event.scaler is not None or event.factor in by_hand else 1.0
            for each in event.ids:
                carried[each] = Carried(scale, scale, event.scaler, updates.get(event.scaler, 0))
        elif event.kind == "cleared":
            for each in event.ids:
                carried.pop(each, None)
        elif event.kind == "unscaled":
            _multiply(carried, event, event.inverse)
        elif event.kind == "gradients":
            if event.by is not None and unscales(event, carried, by_hand):
                _multiply(carried, event, event.by)
            for each in event.ids:
                if each in carried:
                    carried[each].used = False  # who changes gradients after the step means to keep them
        elif event.kind == "scaler_update":
            updates[event.scaler] = updates.get(event.scaler, 0) + 1
        elif _takes(event):
            given -= set(event.ids)
            for each in event.ids:
                if each in carried:
                    carried[each].used = True


def _takes(event: Event) -> bool:
    """Whether an event is a step that took the gradients, or was left out with them."""
    if event.kind == "scaler_step":
        return event.ran is False
    return event.kind in ("step", "stepped") and not event.closure


_ABOUT_GRADIENTS = frozenset(
    [
        "backward",
        "stepped",
        "cleared",
        "unscale",
        "unscaled",
        "gradients",
        "gradients_read",
        "scaler_step",
        "scaler_update",
        "step",
    ]
)


def _give(carried: dict[int, Carried], each: int, fresh: bool, scale: float, scaler: int | None, updates: int) -> None:
    old = None if fresh else carried.get(each)
    new = carried[each] = Carried(scale, scale, scaler, updates)
    if old is not None:
        new.old = old.used or old.old
        new.mixed = not old.used and (old.mixed or not near(old.factor, scale))
        new.updates = min(old.updates, updates) if old.scaler == scaler and not old.used else updates


def _multiply(carried: dict[int, Carried], event: Event, factor: float) -> None:
    for each in event.ids:
        if each in carried:
            carried[each].factor *= factor
            carried[each].by = event


def near(one: float, other: float) -> bool:
    """Whether two scales are the same, but for rounding."""
    return abs(one - other) <= _NEAR * max(abs(one), abs(other))


def unscales(event: Event, carried: dict[int, Carried], by_hand: set[float]) -> bool:
    """Whether a product of gradients with a number takes a scale off: the one they carry, or carried."""
    if event.by is None or not 0 < event.by <= 0.5 or event.computed:
        return False
    scales = {carried[each].scale for each in event.ids if each in carried}
    return any(scale >= 2 and near(event.by * scale, 1) for scale in scales | by_hand)


def hand_scales(record: Record) -> set[float]:
    """Returns the factors of losses that are loss scales without a scaler: gradients are divided by them, or float16
    products ran backward from a loss that was multiplied with a large power of two."""
    found = set[float]()
    for event in record.of("backward"):
        if event.scaler is not None or event.factor < 2:
            continue
        inverses = [
            each.by if each.kind == "gradients" else each.inverse for each in record.of("gradients", "unscaled")
        ]
        divided = any(inverse is not None and near(inverse * event.factor, 1) for inverse in inverses)
        power = event.factor >= 64 and float(event.factor).hex().startswith("0x1.0000000000000p")
        if divided or (power and torch.float16 in event.products):
            found.add(event.factor)
    return found


def name_of(record: Record, ids: list[int]) -> str:
    """Returns the module of the parameters, if it is one; of one parameter alone its name."""
    names = [record.params.get(each, "") for each in ids]
    if len(names) == 1:
        return names[0]
    modules = {name.rpartition(".")[0] for name in names}
    return modules.pop() if len(modules) == 1 else ""
