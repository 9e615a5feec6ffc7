"""An optimizer's step on copies gives what the step gave, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_lab.watching.kept import Kept


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=0.1),
        lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False),
        lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
        lambda params: torch.optim.RMSprop(params, lr=0.1),
        lambda params: torch.optim.Adafactor(params, lr=0.1),
    ],
)
def test_the_same_step(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = make(model.parameters())
    kept = Kept(lambda param: "w")
    for _ in range(3):
        model(torch.randn(2, 4)).square().mean().backward()
        kept.take(optimizer, None, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    (before,) = kept.steps
    now = [param.detach().clone() for param in model.parameters()]
    state = {key: value.clone() for key, value in optimizer.state[model.weight].items() if torch.is_tensor(value)}
    assert all(map(torch.equal, before.run(), before.after())) and all(map(torch.equal, before.run(), now))
    halved = before.largest_update(before.run(options={"lr": 0.05}))
    assert halved == pytest.approx(before.largest_update(now) / 2, rel=0.05)
    assert before.run(torch.float64)[0].dtype == torch.float64
    assert all(map(torch.equal, now, model.parameters())) and model.weight.grad is None
    assert all(torch.equal(value, optimizer.state[model.weight][key]) for key, value in state.items())
    assert before.rates == [[0.1, 0.1]] and kept.bytes > 2 * 4 * 20


def test_copies_go_into_the_same_memory() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    kept = Kept(lambda param: "w")
    places = []
    for _ in range(3):
        model(torch.randn(2, 4)).square().mean().backward()
        kept.take(optimizer, None, 1.0)
        optimizer.step()
        param = kept.steps[0].params[0]
        places.append((param.value.data_ptr(), param.state["exp_avg"].data_ptr() if param.state else 0))
    assert places[1] == places[2] and places[0][0] == places[1][0]
