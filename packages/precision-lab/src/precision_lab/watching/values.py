"""Numbers that are on some device, read later where reading would wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from precision_lab.auditing.sample import local


def whole(tensor: Tensor) -> Tensor | None:
    """Returns a tensor of one value that this rank has all of; of a DTensor that is spread over ranks None."""
    if tensor.numel() != 1:
        return None
    placements = getattr(tensor, "placements", None)
    return tensor if placements is None else local(tensor) if all(p.is_replicate() for p in placements) else None


class Value:
    """A number. On a CPU it is read at once; CUDA copies it into pinned memory, and it is read when it has come."""

    def __init__(self, source: Tensor | float) -> None:
        self._number: float | None = None
        self._copy: Copies | None = None
        if isinstance(source, Tensor) and source.device.type != "cpu":
            self._copy = Copies([source.detach()])
        else:
            self._number = float(source.detach()) if isinstance(source, Tensor) else float(source)

    @property
    def ready(self) -> bool:
        """Whether `read` waits for nothing."""
        return self._copy is None or self._copy.ready

    def read(self) -> float:
        """Returns the number; waits for the device where it must."""
        if self._number is None:
            assert self._copy is not None
            self._number, self._copy = float(self._copy.read()[0]), None
        return self._number


class Copies:
    """Tensors on their way into CPU memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors: list[Tensor] = []
        self._event: Any = None
        for tensor in tensors:
            tensor = local(tensor)
            if tensor.device.type == "cuda":
                copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
                copy.copy_(tensor, non_blocking=True)
                self._tensors.append(copy)
            else:  # elsewhere nothing is copied without waiting: kept as it is until it is read
                self._tensors.append(tensor)
        if any(tensor.device.type == "cuda" for tensor in map(local, tensors)):
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        """Whether all have come, or are on a CPU."""
        if self._event is not None:
            return bool(self._event.query())
        return all(tensor.device.type == "cpu" for tensor in self._tensors)

    def read(self) -> list[Tensor]:
        """Returns the tensors in CPU memory."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.cpu() for tensor in self._tensors]
