"""Exceptions in backward that the user catches: the next step is as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy
from precision_fsdp.recovery import begin_anew


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fail(*_: Any) -> None:
    raise KeyError("stop")


def steps(where: str) -> list[torch.Tensor]:
    model = Net()
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(), precision="64-true")
    other = fabric.setup(nn.Linear(4, 4))  # never run: nothing to begin anew
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    for step in range(3):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step)).chunk(2)[fabric.global_rank]
        if step == 1 and where:
            output = model(x)
            handle = (
                model.blocks[0].register_full_backward_hook(fail) if where == "block" else output.register_hook(fail)
            )
            output = model(x) if where == "block" else output
            with pytest.raises(KeyError, match="stop"):
                fabric.backward(output.sum())
            handle.remove()
        optimizer.zero_grad()
        fabric.backward(model(x).pow(2).mean())
        optimizer.step()
    assert not any(isinstance(param.grad, torch.Tensor) for param in other.parameters())
    return [param.full_tensor().detach() for param in model.parameters()]  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot go on: torch 2.13 can")
@pytest.mark.parametrize("where", ["output", "block"])
def test_training_goes_on_as_if_backward_had_not_been_called(where: str) -> None:
    for expected, found in zip(run_in_ranks(2, steps, ""), run_in_ranks(2, steps, where), strict=True):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-15)


def fail_as_unknown() -> None:
    raise AttributeError("reset_iter_state")


def forward_after_that() -> str:
    model = Fabric(accelerator="cpu", strategy=FSDPStrategy()).setup(Net())
    model.reset_iter_state = fail_as_unknown
    begin_anew(model)
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(1, 4))
    return str(caught.value)


def test_a_torch_that_cannot_begin_anew_refuses_the_next_forward() -> None:
    assert all("backward raised an exception before" in text for text in run_in_ranks(2, forward_after_that))
