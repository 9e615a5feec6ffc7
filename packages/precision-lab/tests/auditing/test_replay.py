"""The scale that each gradient carries, event by event."""

from __future__ import annotations

from typing import Any

import torch

from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import hand_scales, name_of, replay


def record(*events: tuple[str, dict[str, Any]]) -> Record:
    return Record(events=[Event(kind, None, "", 0, data) for kind, data in events])


def backward(factor: float, scaler: int | None = 1, fresh: tuple[int, ...] = (7,), **data: Any) -> tuple[str, Any]:
    return "backward", {"factor": factor, "scaler": scaler, "ids": [7], "fresh": list(fresh), "products": [], **data}


def step() -> tuple[str, dict[str, Any]]:
    return "step", {"ids": [7], "closure": False}


def factors(seen: Record) -> list[float | None]:
    return [moment.carried[7].factor if 7 in moment.carried else None for moment in replay(seen)]


def test_a_scale_comes_with_backward_and_goes_with_unscaling() -> None:
    seen = record(backward(1024.0), ("unscaled", {"ids": [7], "inverse": 1 / 1024, "found": False}), step())
    assert factors(seen) == [None, 1024.0, 1.0]


def test_a_second_backward_adds_and_a_fresh_one_begins() -> None:
    half = ("unscaled", {"ids": [7], "inverse": 1 / 1024, "found": False})
    *_, last = replay(record(backward(1024.0), half, backward(1024.0, fresh=()), step()))
    assert last.carried[7].mixed
    *_, last = replay(record(backward(1024.0), half, backward(1024.0), step()))
    assert not last.carried[7].mixed


def test_what_was_used_and_not_cleared_is_old() -> None:
    *_, last = replay(record(backward(8.0), step(), backward(8.0, fresh=()), step()))
    assert last.carried[7].old
    *_, last = replay(record(backward(8.0), step(), ("cleared", {"ids": [7]}), backward(8.0), step()))
    assert not last.carried[7].old


def test_engines_are_left_out() -> None:
    seen = record(backward(1024.0), step())
    seen.events[1].library = "DeepSpeed"
    assert [moment.event.kind for moment in replay(seen)] == ["backward"]


def test_a_factor_is_a_scale_where_it_is_taken_off_or_float16_needs_it() -> None:
    divided = ("gradients", {"ids": [7], "by": 1 / 10, "computed": False})
    assert hand_scales(record(backward(10.0, None), divided)) == {10.0}
    assert hand_scales(record(backward(784.0, None))) == set()
    assert hand_scales(record(backward(1024.0, None))) == set()
    assert hand_scales(record(backward(1024.0, None, products=[torch.float16]))) == {1024.0}


def test_names() -> None:
    seen = Record(params={1: "a.weight", 2: "a.bias", 3: "b.weight"})
    assert name_of(seen, [1]) == "a.weight"
    assert name_of(seen, [1, 2]) == "a"
    assert name_of(seen, [1, 3]) == ""
