"""What loops do between forward and step: graphs, errors that are caught, clipping twice, changes of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import RankError, run_in_ranks
from precision_deepspeed import DeepSpeedStrategy
from precision_deepspeed.engine import INCOMPLETE

STAGES = (0, 1, 2, 3)
INPUT = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Interruption(Exception):
    pass


def backward(fabric: Fabric | None, loss: Tensor, **options: Any) -> None:
    loss.backward(**options) if fabric is None else fabric.backward(loss, **options)


def raises_in_backward(fabric: Fabric | None, model: Net, optimizer: Any) -> None:
    def interrupt(*args: Any) -> None:
        raise Interruption

    hook = model.last.register_full_backward_hook(interrupt)
    with pytest.raises(Interruption):
        backward(fabric, model(INPUT).pow(2).mean())
    hook.remove()
    if fabric is not None:
        with pytest.raises(RuntimeError, match=r"optimizer\.zero_grad"):
            backward(fabric, model(INPUT).pow(2).mean())
        with pytest.raises(RuntimeError, match="before any backward"):
            optimizer.step()
    for _ in range(2):
        optimizer.zero_grad()
        backward(fabric, model(INPUT).pow(2).mean())
        optimizer.step()


def two_forwards_then_two_backwards(fabric: Fabric | None, model: Net, optimizer: Any) -> None:
    losses = [model(INPUT * factor).pow(2).mean() for factor in (1, 2)]
    for loss in losses:
        backward(fabric, loss)
    optimizer.step()


def clipped_twice(fabric: Fabric | None, model: Net, optimizer: Any) -> None:
    backward(fabric, model(INPUT).pow(2).mean())
    norms = []
    for limit in (0.1, 10.0):
        if fabric is None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit))
        else:
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=limit))  # type: ignore[arg-type]
    assert float(norms[1]) == pytest.approx(0.1, rel=1e-4)
    optimizer.step()


def moved(loop: Callable[..., None], stage: int | None) -> dict[str, Tensor]:
    """Returns what the loop subtracted, under a stage or in plain torch."""
    model = Net()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if stage is None:
        loop(None, model, optimizer)
        return {name: before[name] - param.detach() for name, param in model.named_parameters()}
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage))
    fabric.setup(model, optimizer)
    loop(fabric, model, optimizer)
    with fabric.strategy.gathered(model):
        return {name: before[name] - param.detach() for name, param in model.named_parameters()}


def loops(stage: int) -> None:
    for loop in (raises_in_backward, two_forwards_then_two_backwards, clipped_twice):
        mine, theirs = moved(loop, stage), moved(loop, None)
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=f"{loop.__name__} {name}")


@pytest.mark.parametrize("stage", STAGES)
def test_loops_end_where_torchs_do(stage: int) -> None:
    run_in_ranks(1, loops, stage)


def passed_over(stage: int) -> None:
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage))
    model = Net()
    by_shape = torch.optim.Adafactor(model.parameters())
    with pytest.raises(ValueError, match=r"Adafactor looks at the shape.*stage=0"):
        fabric.setup(model, by_shape)
    model = Net()
    model.first.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    with pytest.raises(RuntimeError, match="learning rate of 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    fabric.backward(model(INPUT).pow(2).mean())
    with pytest.raises(ValueError, match="all gradients of the engine together"):
        fabric.clip_gradients(model.first, max_norm=1.0)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    with pytest.raises(RuntimeError, match="clip by value first"):
        fabric.clip_gradients(model, optimizer, clip_val=1.0)
    optimizer.step()
    model.first.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"\['first\.bias'\] did not train when"):
        fabric.backward(model(INPUT).pow(2).mean())
    fabric.teardown()
    assert not {"add_param_group", "zero_grad", "step"} & vars(optimizer).keys()


def after_a_backward_that_raised(stage: int) -> list[float]:
    """Returns how far the model moves once its gradients were dropped."""
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage))
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    before = model.weight.detach().clone() if stage < 3 else None

    def fail(gradient: torch.Tensor) -> None:
        raise KeyError("mine")

    output = model(torch.ones(1, 4))
    output.register_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        fabric.backward(output.sum())
    for call in (lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0), optimizer.step):
        with pytest.raises(RuntimeError, match="backward"):
            call()
    assert before is None or torch.equal(model.weight, before)
    optimizer.zero_grad()
    with fabric.strategy.gathered(model):
        start = model.weight.detach().clone()
    fabric.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    with fabric.strategy.gathered(model):
        moved: list[float] = (start - model.weight.detach()).flatten().tolist()
    fabric.teardown()
    return moved


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_raised_is_not_stepped(stage: int) -> None:
    assert run_in_ranks(1, after_a_backward_that_raised, stage) == [pytest.approx([1.0] * 4)]


def one_of_two_backwards_raises(stage: int) -> None:
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage))
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.ones(1, 4)).sum())
    output = model(torch.ones(1, 4))
    output.register_hook(lambda gradient: (_ for _ in ()).throw(KeyError("mine")))
    with pytest.raises(KeyError, match="mine"):
        fabric.backward(output.sum())
    for call in (lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0), optimizer.step):
        with pytest.raises(RuntimeError, match=INCOMPLETE[:40]):
            call()
    fabric.teardown()


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_a_backward_that_raised_are_neither_clipped_nor_stepped(stage: int) -> None:
    run_in_ranks(1, one_of_two_backwards_raises, stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_the_engine_would_pass_over_is_refused(stage: int) -> None:
    run_in_ranks(1, passed_over, stage)


def unscaled(stage: int, mode: str) -> float:
    """Returns how far a gradient of norm 0.5 that torch clips to 0.125 moves the model."""
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision=mode)
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.full((1, 4), 0.5)).sum() / 2)
    fabric.unscale_gradients(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.125)
    optimizer.step()
    norm = model.weight.detach().float().norm().item()
    fabric.teardown()
    return norm


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_gradients_are_unscaled_at_stage_0(mode: str) -> None:
    assert run_in_ranks(2, unscaled, 0, mode) == [pytest.approx(0.125, rel=1e-2)] * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_the_engine_holds_are_not_unscaled(stage: int) -> None:
    with pytest.raises(RankError, match=r"fabric\.clip_gradients\(model, optimizer.*safe_get_full_grad"):
        run_in_ranks(1, unscaled, stage, "16-mixed")
