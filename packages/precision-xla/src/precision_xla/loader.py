"""Loading: batches reach the device through torch_xla's transfers, and each new one ends the graph of the last.

Loaders with worker processes go through the vendor's own loader, whose threads draw and transfer batches ahead. Others
are fetched in the training thread: a thread that prefetches draws random numbers ahead, too, and a checkpoint in the
middle of the epoch would hold generators that are ahead of the batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from precision_core.data import DeviceLoader
from precision_core.policy import map_tensors
from precision_xla import vendor


class XLALoader(DeviceLoader):
    """Core's loader, with its position in the epoch, moving batches as torch_xla does.

    Args:
        loader: what is iterated over.
        device: the XLA device.
        mesh: the devices over which batches are sharded along their first dimension; None: there is one.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, mesh: vendor.Mesh | None) -> None:
        super().__init__(loader, device)
        self._mesh = mesh

    def moved(self, batches: Iterator[Any]) -> Iterator[Any]:
        return self._ahead(batches) if self.has_workers() else self._one_by_one(batches)

    def _one_by_one(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            vendor.sync()
            try:
                batch = next(batches)
            except StopIteration:
                return
            tensors = _tensors_of(batch)
            yield self._with(batch, vendor.upload(tensors, self.destination, self._mesh))

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        drawn: deque[Any] = deque()
        errors: list[BaseException] = []

        def draw() -> Iterator[list[Tensor]]:
            try:
                for batch in batches:
                    drawn.append(batch)  # the vendor moves lists of tensors; what they were in stays here
                    yield _tensors_of(batch)
            except BaseException as error:  # in the vendor's thread, where it would end the epoch and say nothing
                errors.append(error)

        for tensors in vendor.upload_ahead(draw(), self.destination, self._mesh):
            yield self._with(drawn.popleft(), tensors)
        if errors:
            raise errors[0]

    def _with(self, batch: Any, moved: list[Tensor]) -> Any:
        """Returns `batch` on the device, where `moved` are those of its tensors that the vendor has moved."""
        new = {id(tensor): other for tensor, other in zip(_tensors_of(batch), moved, strict=True)}
        return map_tensors(batch, lambda tensor: new[id(tensor)] if id(tensor) in new else tensor.to(self.destination))


def _tensors_of(batch: Any) -> list[Tensor]:
    """Returns the tensors in `batch` that the vendor moves, each once."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided:
            found.setdefault(id(tensor), tensor)
        return tensor

    map_tensors(batch, keep)
    return list(found.values())
