"""Arrival: copies in CPU memory that an accelerator is still making, and one event that says when they are there."""

from __future__ import annotations

import torch
from torch import Tensor

_ASYNCHRONOUS = {"cuda", "xpu"}
"""Kinds of devices whose copies go on while Python does; torch makes them in pinned memory, and keeps that."""


class Arrival:
    """Copies of tensors in CPU memory; who reads one waits first.

    Training may go on before that: its next kernels come after the copies in the same stream, so what they write is not
    in them.
    """

    def __init__(self) -> None:
        self._pending: set[torch.device] = set()
        self._events: list[torch.Event] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """Returns a copy of `tensor` in CPU memory, a DTensor's with this rank's shard, to be read after `wait`."""
        later = tensor.device.type in _ASYNCHRONOUS
        if later:
            self._pending.add(tensor.device)
        return tensor.detach().to("cpu", copy=True, non_blocking=later).requires_grad_(tensor.requires_grad)

    def record(self) -> None:
        """Takes note that the copies so far are all; one event for each device that makes some."""
        self._events += [_event(device) for device in self._pending]
        self._pending.clear()

    def wait(self) -> None:
        """Returns when all copies that were recorded are there; from any thread."""
        for event in self._events:
            event.synchronize()


def _event(device: torch.device) -> torch.Event:
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event
