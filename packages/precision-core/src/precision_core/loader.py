"""Data loaders whose batches arrive on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from precision_core.casting import map_tensors


class DeviceLoader:
    """Iterates over `loader` and moves each batch's tensors to `device`, dtypes untouched; else it is `loader`."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield map_tensors(batch, lambda tensor: tensor.to(self._device, non_blocking=True))

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loader" not in self.__dict__:  # copy and pickle ask before there is a loader
            raise AttributeError(name)
        return getattr(self._loader, name)
