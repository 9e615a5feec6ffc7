"""Ranks that use different parts of a model: the true gradient, or an error on all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy


class Choice(nn.Module):
    """Two layers of the same shape, of which a forward takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.last = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.last(self.layers[which](x))


def rows(rank: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(rank))


def reference() -> dict[str, Tensor]:
    """Returns the mean of two ranks' gradients in float64, where the second rank takes the second layer."""
    model = Choice().double()
    for rank in range(2):
        (model(rows(rank).double(), rank).pow(2).mean() / 2).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def of_other_layers(stage: int) -> dict[str, Tensor] | None:
    model = Choice()
    before = {name: param.detach().double().clone() for name, param in model.named_parameters()}
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    if stage == 2:  # after these, stage 3's ranks would wait for each other in DeepSpeed's gathers
        for which in (0, 1, 0):  # all ranks alike may change from step to step
            optimizer.zero_grad()
            fabric.backward(model(rows(fabric.global_rank), which).pow(2).mean())
            optimizer.step()
        optimizer.zero_grad()
    fabric.backward(model(rows(fabric.global_rank), fabric.global_rank).pow(2).mean())
    if stage >= 2:
        with pytest.raises(RuntimeError, match=r"ranks gave gradients to different parameters.*stage=0 or 1"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="ranks gave gradients to different parameters"):
            optimizer.step()  # the same gradients again
        assert fabric.precision_plugin.steps == (3 if stage == 2 else 0)
        return None
    optimizer.step()
    return {name: before[name] - param.detach().double() for name, param in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_use_other_layers_are_right_or_told(stage: int) -> None:
    for moved in run_in_ranks(2, of_other_layers, stage):
        for name, gradient in reference().items() if moved is not None else ():
            torch.testing.assert_close(moved[name], gradient, rtol=1e-5, atol=1e-6)


def told(how: str) -> list[Tensor]:
    zero = {"compute_grad_norm": False} if how == "no norm" else {}
    model = Choice()
    strategy = DeepSpeedStrategy(2, {"zero_optimization": zero}, offload_optimizer=how == "offload")
    fabric = Fabric(accelerator="cpu", strategy=strategy)
    groups = [{"params": [*model.layers.parameters()]}, {"params": [*model.last.parameters()]}]
    optimizer = torch.optim.SGD(groups if how == "two groups" else model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    fabric.backward(model(rows(fabric.global_rank), fabric.global_rank).pow(2).mean())
    with pytest.raises(RuntimeError, match="ranks gave gradients to different parameters"):
        if how == "clip":
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"a step that raised, ended the accumulation.*zero_grad"):
        fabric.backward(model(rows(0), 0).pow(2).mean())
    assert all(torch.equal(old, param) for old, param in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    fabric.backward(model(rows(fabric.global_rank), 1).pow(2).mean())
    optimizer.step()
    return [(old - param.detach()).double() for old, param in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("how", ["clip", "offload", "two groups", "no norm"])
def test_all_ways_to_a_step_tell_and_zero_grad_goes_on(how: str) -> None:
    model = Choice().double()
    for rank in range(2):
        (model(rows(rank).double(), 1).pow(2).mean() / 2).backward()
    for moved in run_in_ranks(2, told, how):
        for param, step in zip(model.parameters(), moved, strict=True):
            gradient = torch.zeros_like(param) if param.grad is None else param.grad
            torch.testing.assert_close(step, gradient, rtol=1e-5, atol=1e-6)


def reductions(stage: int) -> list[int]:
    model = Choice()
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    fabric.setup(model, optimizer)
    counts = []
    for which in (0, 0, 0, 1, 1):
        fabric.backward(model(rows(0), which).pow(2).mean())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "gloo:all_reduce"))
    return counts


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_agreed_once_reduce_nothing_more_for_it(stage: int) -> None:
    for counts in run_in_ranks(2, reductions, stage):
        assert counts == [3, 1, 1, 3, 1]  # one is DeepSpeed's own
