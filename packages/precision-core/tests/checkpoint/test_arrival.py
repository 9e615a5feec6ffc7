"""Copies that a device is still making: one event for all, and the thread that writes waits for it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from precision_core import Fabric
from precision_core.checkpoint import arrival
from precision_core.checkpoint.arrival import Arrival
from precision_core.checkpoint.background import copied


class Copies(TorchFunctionMode):
    """Counts copies to the CPU by whether they are asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and "cpu" in args:
            self.asynchronous.append(bool(kwargs.get("non_blocking")))
        return func(*args, **kwargs)


class Event:
    """One of a device's events, which happens when it is told."""

    def __init__(self, after: int) -> None:
        self.after, self.happened, self.asked = after, threading.Event(), threading.Event()

    def synchronize(self) -> None:
        self.asked.set()
        assert self.happened.wait(30)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> tuple[Copies, list[Event]]:
    """Has the CPU play a device whose copies go on while Python does."""
    copies, events = Copies(), list[Event]()

    def record(device: torch.device) -> Event:
        events.append(Event(after=len(copies.asynchronous)))
        return events[-1]

    monkeypatch.setattr(arrival, "_ASYNCHRONOUS", {"cpu"})
    monkeypatch.setattr(arrival, "_event", record)
    return copies, events


def test_one_event_follows_all_copies(device: tuple[Copies, list[Event]]) -> None:
    copies, events = device
    with copies:
        content, _ = copied({str(number): torch.full((2,), float(number)) for number in range(5)})
    assert copies.asynchronous == [True] * 5 and [event.after for event in events] == [5]
    assert [tensor.tolist() for tensor in content.values()] == [[number] * 2 for number in range(5)]


def test_the_thread_waits_for_the_copies_and_training_does_not(
    device: tuple[Copies, list[Event]], tmp_path: Path
) -> None:
    fabric, model = Fabric(accelerator="cpu"), nn.Linear(2, 2)
    expected = model.weight.detach().clone()
    save = fabric.save(tmp_path / "x", {"model": model}, wait=False)
    (event,) = device[1]
    nn.init.zeros_(model.weight)
    assert event.asked.wait(30) and not save.done and not list(tmp_path.iterdir())
    event.happened.set()
    save.wait()
    assert torch.equal(fabric.load(tmp_path / "x")["model"]["weight"], expected)


def test_copies_of_a_cpu_are_there_at_once() -> None:
    copies, made = Copies(), Arrival()
    with copies:
        copy = made.copy(torch.ones(2, requires_grad=True))
    made.record()
    made.wait()
    assert copies.asynchronous == [False] and copy.requires_grad and not made._events


def test_a_gpus_tensors_come_to_the_cpu_with_their_strides() -> None:
    made, copies = Arrival(), Copies()
    with FakeTensorMode(), copies:
        live = torch.empty(3, 2, device="cuda").t()
        copy = made.copy(live)
    assert copy.device == torch.device("cpu") and copy.stride() == live.stride() and copies.asynchronous == [True]
    assert made._pending == {live.device}
