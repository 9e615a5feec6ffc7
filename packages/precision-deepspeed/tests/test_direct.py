"""Autograd that the user's own loop calls: gradients of inputs, of second order, backwards that are not Fabric's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy, direct

STAGES = (0, 1, 2, 3)
INPUT = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
Loop = Callable[["Fabric | None", nn.Module, Any], list[float]]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def step(fabric: Fabric | None, optimizer: Any, loss: Tensor) -> float:
    loss.backward() if fabric is None else fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def rows(model: nn.Module, fabric: Fabric | None) -> Tensor:
    return INPUT.to(next(model.parameters()).dtype if fabric is None else torch.float32).clone().requires_grad_()


def adversarial(fabric: Fabric | None, model: nn.Module, optimizer: Any) -> list[float]:
    losses = []
    for index in range(4):
        x = rows(model, fabric)
        model.train(index % 2 == 0)
        (gradient,) = torch.autograd.grad(model(x).pow(2).mean(), x)
        losses.append(step(fabric, optimizer, model((x + 0.1 * gradient.sign()).detach()).pow(2).mean()))
    return losses


def through_x_grad(fabric: Fabric | None, model: nn.Module, optimizer: Any) -> list[float]:
    found = []
    for _ in range(2):
        x = rows(model, fabric)
        scale = 1.0 if fabric is None else fabric.precision_plugin.scale
        found.append(step(fabric, optimizer, model(x).pow(2).mean()))
        assert x.grad is not None
        found += [value / scale for value in x.grad.flatten().tolist()]
    return found


def in_an_accumulation(fabric: Fabric | None, model: nn.Module, optimizer: Any) -> list[float]:
    losses = []
    for _ in range(3):
        x = rows(model, fabric)
        loss = model(x).pow(2).mean()
        loss.backward() if fabric is None else fabric.backward(loss)
        y = rows(model, fabric)
        model(y).pow(2).mean().backward(inputs=[y])
        assert y.grad is not None
        losses.append(step(fabric, optimizer, model((y + y.grad.sign()).detach()).pow(2).mean()))
    return losses


def of_a_layer(fabric: Fabric | None, model: nn.Module, optimizer: Any) -> list[float]:
    losses = []
    for _ in range(3):
        hidden: list[Tensor] = []
        hook = model[0].register_forward_hook(lambda module, args, output, to=hidden: to.append(output))  # type: ignore[index]
        loss = model(rows(model, fabric)).pow(2).mean()
        hook.remove()
        (gradient,) = torch.autograd.grad(loss, hidden[0])
        losses.append(step(fabric, optimizer, model(rows(model, fabric)).pow(2).mean() * gradient.double().abs().sum()))
    return losses


def penalised(fabric: Fabric | None, model: nn.Module, optimizer: Any) -> list[float]:
    losses = []
    for _ in range(3):
        x = rows(model, fabric)
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        losses.append(step(fabric, optimizer, out.pow(2).mean() + (gradient.norm(dim=1) - 1).pow(2).mean()))
    return losses


def hessian_product(fabric: Fabric | None, model: nn.Module, optimizer: Any) -> list[float]:
    x = rows(model, fabric).detach()
    of = torch.autograd.functional.hvp(lambda x: model(x).pow(2).sum(), x, torch.ones_like(x))[1]
    return [*of.flatten().tolist(), *torch.func.grad(lambda x: model(x).pow(2).sum())(x).flatten().tolist()]


FIRST_ORDER: tuple[Loop, ...] = (adversarial, through_x_grad, in_an_accumulation, of_a_layer)
SECOND_ORDER: tuple[Loop, ...] = (penalised, hessian_product)


def run(loop: Loop, stage: int, mode: str) -> list[float]:
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision=mode)
    model = net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = loop(fabric, model, optimizer)
    fabric.teardown()
    return found


def by_hand(loop: Loop) -> list[float]:
    model = net(torch.float64)
    return loop(None, model, torch.optim.SGD(model.parameters(), lr=0.1))


def run_all(stage: int, mode: str) -> list[list[float]]:
    return [run(loop, stage, mode) for loop in (*FIRST_ORDER, *(SECOND_ORDER if stage < 3 else ()))]


TOLERANCE = {"32-true": 1e-5, "16-mixed": 2e-3, "bf16-mixed": 2e-2, "bf16-true": 2e-2}
CASES = [
    pytest.param(stage, mode, marks=[] if mode == "32-true" and stage != 1 else pytest.mark.full)
    for stage in STAGES
    for mode in TOLERANCE
]


@pytest.mark.parametrize(("stage", "mode"), CASES)
def test_gradients_of_inputs_are_those_of_torch(stage: int, mode: str) -> None:
    for values in run_in_ranks(2 if mode == "32-true" and stage > 1 else 1, run_all, stage, mode):
        for loop, mine in zip((*FIRST_ORDER, *SECOND_ORDER), values, strict=False):
            torch.testing.assert_close(
                torch.tensor(mine), torch.tensor(by_hand(loop)), rtol=TOLERANCE[mode], atol=TOLERANCE[mode],
                msg=lambda message, name=loop.__name__: f"{name}: {message}",
            )  # fmt: skip


def second_order(model: nn.Module) -> None:
    x = INPUT.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x, create_graph=True)


def hvp(model: nn.Module) -> None:
    torch.autograd.functional.hvp(lambda x: model(x).pow(2).sum(), INPUT, torch.ones_like(INPUT))


def transformed(model: nn.Module) -> None:
    torch.func.grad(lambda x: model(x).sum())(INPUT)


def twice(model: nn.Module) -> None:
    x = INPUT.clone().requires_grad_()
    loss = model(x).sum()
    for _ in range(2):
        torch.autograd.grad(loss, x, retain_graph=True)


def refused(stage: int, mode: str, evaluates: bool) -> None:
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision=mode)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup_module(model.eval()) if evaluates else fabric.setup(model, optimizer)
    if stage == 3:
        for call, words in (
            (second_order, r"autograd\.grad\(\.\.\., create_graph=True\).*stage=0, 1 or 2"),
            (hvp, r"Hessian-vector products.*stage=0, 1 or 2"),
            (transformed, r"torch\.func.*stage=0, 1 or 2"),
            (twice, r"second backward through one forward.*Call the model again"),
        ):
            with pytest.raises(RuntimeError, match=words):
                call(model)
    if evaluates:
        x = INPUT.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).pow(2).mean(), x)
        y = INPUT.double().requires_grad_()
        (expected,) = torch.autograd.grad(net(torch.float64)(y).pow(2).mean(), y)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
        return
    with pytest.raises(RuntimeError, match=r"loss\.backward\(\).*fabric\.backward\(loss\): call that"):
        model(INPUT).pow(2).mean().backward()
    with pytest.raises(ValueError, match=r"create_graph=True\): DeepSpeed's engine.*torch\.autograd\.grad"):
        fabric.backward(model(INPUT).sum(), create_graph=True)
    torch.testing.assert_close(adversarial(fabric, model, optimizer), by_hand(adversarial), rtol=1e-5, atol=1e-6)
    fabric.teardown()


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2)), 3])
def test_what_cannot_be_right_is_refused_before_anything_changes(stage: int) -> None:
    run_in_ranks(1, refused, stage, "32-true", False)


def test_models_for_evaluation_in_shards_too() -> None:
    run_in_ranks(1, refused, 3, "32-true", True)


def test_torch_has_the_private_names() -> None:
    seen: list[tuple[bool, int]] = []

    def look(gradient: Tensor) -> None:
        seen.append((direct._will_fill(weight), torch._C._current_graph_task_id()))

    weight, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for call in (lambda out: out.sum().backward(), lambda out: torch.autograd.grad(out.sum(), x),
                 lambda out: torch.autograd.grad(out.sum(), weight)):  # fmt: skip
        out = weight * x
        out.register_hook(look)
        call(out)
    assert [fills for fills, _ in seen] == [True, False, False]
    assert len({number for _, number in seen}) == 3
    assert torch.func.grad(lambda x: x.sum() * float(direct._is_transforming()))(torch.ones(2)).tolist() == [1.0, 1.0]
