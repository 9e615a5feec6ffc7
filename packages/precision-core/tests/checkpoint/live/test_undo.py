"""What is undone is undone at every depth."""

from __future__ import annotations

import torch
from torch import nn

from precision_core.checkpoint.live.undo import undo_of


def test_a_modules_values_come_back_at_every_depth() -> None:
    torch.manual_seed(0)
    deepest = nn.BatchNorm1d(2)
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2), deepest)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    undo = undo_of(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    deepest.weight = nn.Parameter(torch.full((2,), 7.0))
    deepest.momentum = 0.5
    undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert deepest.momentum == 0.1
