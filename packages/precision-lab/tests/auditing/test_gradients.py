"""What is computed from gradients is followed, and nothing that only lies where a gradient lay."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from precision_lab.auditing.gradients import Gradients, degree_of, factor_of
from precision_lab.auditing.record import Event
from precision_lab.auditing.recorder import Recorder


def gradients_of(param: nn.Parameter) -> Gradients:
    return Gradients(lambda: [param])


def test_views_of_a_gradient_are_it_and_freed_memory_is_not() -> None:
    param = nn.Parameter(torch.zeros(4))
    gradients = gradients_of(param)
    gradients.before_backward()
    param.grad = torch.ones(4)
    assert gradients.after_backward() == ([id(param)], [id(param)])
    held = param.grad
    assert gradients.find(held[1:]) == [id(param)]
    param.grad = None
    assert gradients.find(held) == []  # where the gradient lay there is something else now


def test_a_backward_that_adds_is_told_from_one_that_begins() -> None:
    param = nn.Parameter(torch.zeros(4))
    gradients = gradients_of(param)
    for fresh in (True, False):
        gradients.before_backward()
        (param * 2).sum().backward()
        assert gradients.after_backward() == ([id(param)], [id(param)] if fresh else [])
    assert param.grad is not None
    param.grad.zero_()
    gradients.before_backward()
    (param * 2).sum().backward()
    assert gradients.after_backward() == ([id(param)], [id(param)])
    gradients.before_backward()
    assert gradients.after_backward() == ([], [])


@pytest.mark.parametrize("data", [False, True])
def test_a_gradient_that_is_replaced_counts_as_changed(data: bool) -> None:
    param = nn.Parameter(torch.zeros(4))
    gradients = gradients_of(param)
    param.grad = torch.ones(4)
    event = Event("gradients", None, "", 0, {"ids": []})
    result = param.grad * 0.5
    gradients.follow("mul", (param.grad, 0.5), [param.grad], result, lambda ids: event)
    gradients.settle()
    assert event.ids == []  # computed, and not assigned
    if data:
        param.grad.data = result
    else:
        param.grad = result
    gradients.settle()
    assert event.ids == [id(param)]


def test_the_degree_says_what_a_scale_does() -> None:
    one, norm = torch.ones(4), torch.ones(())
    assert degree_of("mul", (one, one), [1.0, 1.0]) == 2
    assert degree_of("div", (one, norm), [1.0, 1.0]) == 0
    assert degree_of("reciprocal", (norm,), [1.0]) == -1
    assert degree_of("sqrt", (norm,), [2.0]) == 1
    assert degree_of("pow", (one, 2), [1.0]) == 2
    assert degree_of("clamp", (norm, None, 1.0), [-1.0]) == -1
    assert degree_of("gt", (norm, 1.0), [1.0]) == 0


@pytest.mark.parametrize(
    ("name", "operand", "factor"),
    [
        ("mul_", 0.5, 0.5),
        ("div_", 4, 0.25),
        ("_foreach_mul_", [2.0, 2.0], 2.0),
        ("_foreach_mul_", [2.0, 3.0], None),
        ("_foreach_div_", torch.tensor(8.0), 0.125),
        ("mul_", torch.ones(3), None),
        ("add_", 1.0, None),
    ],
)
def test_factors(name: str, operand: object, factor: float | None) -> None:
    assert factor_of(name, (torch.ones(3), operand))[0] == factor


def train(context: AbstractContextManager[object]) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    hook = model[0].weight.register_hook(lambda grad: grad * 0.5)
    losses: list[Tensor] = []
    with context:
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(2):
                with torch.autocast("cpu", torch.float16):
                    losses.append(nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 0, 1])))
                scaler.scale(losses[-1]).backward()
            scaler.unscale_(optimizer)
            for param in model.parameters():
                param.grad = param.grad / 2  # type: ignore[operator]
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    hook.remove()
    return [*(float(each.detach()) for each in losses), *(float(each.detach().sum()) for each in model.parameters())]


def test_a_scaled_loop_computes_the_same_bits() -> None:
    assert train(Recorder()) == train(nullcontext())
