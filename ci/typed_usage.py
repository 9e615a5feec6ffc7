"""What a type checker knows of Fabric's results: mypy reads this in lint, and nothing runs it."""

from __future__ import annotations

from typing import Any, assert_type

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from precision_core import Fabric
from precision_core.data import DeviceLoader


class Net(nn.Module):
    def embed(self, x: Tensor) -> Tensor:
        return x


def usage(fabric: Fabric, net: Net, first: AdamW, second: SGD, loader: list[Tensor]) -> None:
    """A model keeps its class, and with it its own methods."""
    assert_type(fabric.setup(net), Net)
    assert_type(fabric.setup(net, first), tuple[Net, AdamW])
    assert_type(fabric.setup(net, first, second), tuple[Any, ...])
    assert_type(fabric.setup_module(net), Net)
    assert_type(fabric.setup_optimizers(first), AdamW)
    assert_type(fabric.setup_optimizers(first, second), tuple[Optimizer, ...])
    assert_type(fabric.setup_dataloaders(loader), DeviceLoader)
    assert_type(fabric.all_reduce({"loss": 1.0}), dict[str, float])
