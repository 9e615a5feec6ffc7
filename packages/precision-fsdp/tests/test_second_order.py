"""Gradients of inputs are torch's; those of second order are refused by name, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy
from precision_fsdp.second_order import _transforms

INPUT = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return {"out": self.last(x)}


def adversarial(fabric: Fabric | None, model: nn.Module, optimizer: Any) -> list[float]:
    losses = []
    for _ in range(4):
        x = INPUT.to(torch.float64 if fabric is None else torch.float32).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)["out"].pow(2).mean(), x)
        loss = model((x + 0.1 * gradient.sign()).detach())["out"].pow(2).mean()
        loss.backward() if fabric is None else fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def penalty(model: nn.Module) -> Any:
    x = INPUT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)["out"].sum(), x, create_graph=True)
    return gradient.norm()


def hessian_product(model: nn.Module) -> Any:
    return torch.autograd.functional.hvp(lambda x: model(x)["out"].pow(2).sum(), INPUT, torch.ones_like(INPUT))


def grad_of_grad(model: nn.Module) -> Any:
    inner = torch.func.grad(lambda x: model(x)["out"].pow(2).sum())
    return torch.func.grad(lambda x: inner(x).sum())(INPUT)


def of_first_order(model: nn.Module) -> list[Tensor]:
    x = INPUT.to(next(model.parameters()).dtype)
    return [
        torch.func.grad(lambda x: model(x)["out"].sum())(x),
        torch.func.jacrev(lambda x: model(x)["out"].sum(0))(x),
        torch.autograd.functional.jacobian(lambda x: model(x)["out"].sum(0), x),
    ]


def gradients(mode: str, reshards: bool) -> None:
    calls: list[tuple[Callable[[nn.Module], Any], str]] = [
        (penalty, r"torch\.autograd\.grad\(\.\.\., create_graph=True\): second-order"),
        (hessian_product, "second-order gradients .gradient penalties, Hessian-vector products"),
        (grad_of_grad, r"torch\.func\.grad of torch\.func\.grad: second-order"),
    ]
    fabric = Fabric(accelerator="cpu", strategy=FSDPStrategy(reshard_after_forward=reshards), precision=mode)
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for training in (True, False):
        model.train(training)
        for call, words in calls:
            with pytest.raises(RuntimeError, match=rf'{words}.*strategy="ddp"'):
                call(model)
    with pytest.raises(ValueError, match=r"fabric\.backward\(loss, create_graph=True\): second-order"):
        fabric.backward(model(INPUT)["out"].sum(), create_graph=True)
    x = INPUT.clone()
    of_function = torch.func.grad_and_value(lambda x: model(x)["out"].sum())
    for value in (of_function(x)[0].norm(), of_function(x)[1]):
        with pytest.raises(RuntimeError, match=r"of what torch\.func .*second-order .*\. The gradients .* are dropped"):
            fabric.backward(value)
        assert all(param.grad is None for param in model.parameters())
    plain = Net().double()
    near = 1e-5 if mode == "32-true" else 2e-2
    for mine, theirs in zip(of_first_order(model), of_first_order(plain), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=near, atol=near)
    right = adversarial(None, plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert adversarial(fabric, model, optimizer) == pytest.approx(right, rel=near)


@pytest.mark.parametrize(
    ("mode", "reshards"),
    [("32-true", True), *(pytest.param(mode, False, marks=pytest.mark.full) for mode in ("bf16-mixed", "16-mixed"))],
)
def test_second_order_is_refused_and_first_order_is_right(mode: str, reshards: bool) -> None:
    run_in_ranks(2, gradients, mode, reshards)


def test_torch_has_the_private_names() -> None:
    seen = []

    def count(x: Tensor) -> Tensor:
        seen.append(_transforms())
        return x.sum()

    count(torch.ones(2))
    torch.func.grad(count)(torch.ones(2))
    torch.func.grad(lambda x: torch.func.grad(count)(x).sum())(torch.ones(2))
    assert seen == [0, 1, 2]
