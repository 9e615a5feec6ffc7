"""Where forward and backward are finite, the optimizer's state is looked at."""

from __future__ import annotations

import torch
from torch import nn

import precision_lab


def test_state_that_is_not_finite_and_an_epsilon_that_is_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-8)
    x = torch.ones(3, 2)
    model(x).sum().backward()
    optimizer.step()
    assert precision_lab.explain(model, x, loss=torch.sum, optimizer=optimizer).kind == "nothing"
    optimizer.state[model[1].weight]["exp_avg_sq"][0, 1] = torch.inf
    found = precision_lab.explain(model, x, loss=torch.sum, optimizer=optimizer)
    assert (found.phase, found.name, found.module) == ("optimizer", "exp_avg_sq of 1.weight", "1")
    half = nn.Linear(2, 1).half()
    adam = torch.optim.Adam(half.parameters(), eps=1e-8)
    found = precision_lab.explain(half, x.half(), loss=torch.sum, optimizer=adam)
    assert found.kind == "optimizer's epsilon" and "eps of 1e-08 is zero in float16" in found.what
    right = torch.optim.Adam(half.parameters(), eps=1e-5)
    assert precision_lab.explain(half, x.half(), loss=torch.sum, optimizer=right).kind == "nothing"
