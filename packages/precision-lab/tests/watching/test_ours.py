"""Which optimizers are the watched models': those given, what they wrap, and all that hold a parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from precision_lab.watching.ours import Ours


def test_which_are() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    own = torch.optim.SGD(model.parameters())
    foreign = torch.optim.SGD(other.parameters())
    assert own in Ours([model], []) and foreign not in Ours([model], [])
    assert foreign in Ours([model], [foreign])
    wrapper: Any = SimpleNamespace(optimizer=foreign)
    assert foreign in Ours([model], [wrapper])
