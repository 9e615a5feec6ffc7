"""Objects on their way to other ranks: their tensors travel in CPU memory, and arrive on the device of who receives."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

Packed = tuple[bytes, list[tuple[Any, ...]]]
"""An object's pickle, and the tensors that were taken out of it."""


def pack(data: Any, device: torch.device) -> Packed:
    """Returns `data` as what can be pickled and sent, with tensors on that kind of device copied into CPU memory.

    Tensors are found wherever pickle finds them, in custom objects too; one that occurs twice is sent once. Other
    tensors, and those of subclasses but `nn.Parameter`, are pickled as they are.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, device)
    pickler.dump(data)
    return file.getvalue(), pickler.tensors


def unpack(packed: Packed, device: torch.device) -> Any:
    """Returns what was packed, on any rank, with its tensors on `device`. Only for what a rank of this run has sent."""
    content, tensors = packed
    unpickler = _Unpickler(io.BytesIO(content))
    unpickler.tensors = [_arrived(device, *each) for each in tensors]
    return unpickler.load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[Any, ...]] = []
        self._device = device
        self._numbers: dict[int, tuple[int, Tensor]] = {}  # by id, with the tensor, so that no other gets it

    def persistent_id(self, value: Any) -> int | None:
        """Returns the number of a tensor that travels apart, None for what is pickled here."""
        if type(value) not in (Tensor, nn.Parameter) or value.device.type != self._device.type:
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors), value
            kind = type(value) is nn.Parameter
            self.tensors.append((value.detach().to("cpu"), kind, value.requires_grad, dict(vars(value))))
        return self._numbers[id(value)][0]


class _Unpickler(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, number: Any) -> Tensor:
        return self.tensors[number]


def _arrived(
    device: torch.device, value: Tensor, is_parameter: bool, trains: bool, attributes: dict[str, Any]
) -> Tensor:
    value = value.to(device)
    result = nn.Parameter(value, trains) if is_parameter else value.requires_grad_(trains)
    vars(result).update(attributes)
    return result
