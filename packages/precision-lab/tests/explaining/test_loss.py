"""A loss outside of the model that goes wrong is read from its graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import precision_lab

LABELS = torch.tensor([[1.0], [torch.inf]])


@pytest.mark.parametrize(
    "of, operation, kind",
    [
        (lambda y: functional.mse_loss(y, LABELS), "MseLoss", "bad data"),
        (lambda y: functional.smooth_l1_loss(y, LABELS), "SmoothL1Loss", "bad data"),
        (lambda y: torch.log(torch.relu(-y.abs())).sum() * 2, "Log", "log of zero"),
        (lambda y: (1 / torch.relu(-y.abs())).mean(), "Reciprocal", "division by zero"),
        (lambda y: (y / torch.relu(-y.abs())).mean(), "Div", "division by zero"),
        (lambda y: torch.exp(y * 1e4).mean(), "Exp", "overflow in exp"),
        (lambda y: (y * 1e25).pow(2).mean(), "Pow", "overflow in a square"),
        (lambda y: torch.sqrt(-(y**2)).sum(), "Sqrt", "root of a negative number"),
    ],
    ids=["mse", "smooth_l1", "log", "reciprocal", "div", "exp", "pow", "sqrt"],
)
def test_the_operation_of_a_loss(of: Callable[[Tensor], Tensor], operation: str, kind: str) -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
    x = torch.ones(2, 2)
    found = precision_lab.explain(model, x, loss=of(model(x)))
    assert (found.phase, found.operation, found.kind) == ("loss", operation, kind)
    assert "the model's outputs are finite, the loss is not" in found.what
    # tried where the graph has kept all operands of the operation
    assert (found.remedy is not None) is (operation in ("MseLoss", "SmoothL1Loss", "Log", "Div"))
    named = precision_lab.explain(model, x, loss=of)  # as a function it is run once more, and has a line
    assert (named.phase, named.kind) == ("loss", kind)
    assert named.line is not None and "lambda y" in named.line.text
    assert named.remedy is not None


def test_the_line_of_a_loss_by_its_text() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(2, 2)
    wrong = functional.mse_loss(model(x), LABELS)
    scaled = wrong * 2
    found = precision_lab.explain(model, x, loss=scaled)
    assert found.line is not None and found.line.text == "wrong = functional.mse_loss(model(x), LABELS)"
    assert any("keeps no lines" in each for each in found.notes)


def test_of_several_lines_it_is_the_one_that_has_the_operations_around() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(2, 2)
    output = model(x)
    wrong = -(torch.log(torch.relu(-output.abs())) * LABELS.clamp_max(2)).mean()
    if not x.numel():
        wrong = torch.log(output)  # this was not run
    found = precision_lab.explain(model, x, loss=wrong)
    assert found.line is not None and found.line.text.startswith("wrong = -(torch.log(torch.relu(")


def test_a_square_of_a_half_loss_is_mended_in_float32() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(2, 2)
    loss = ((model(x).half() + 4) * 300).pow(2).mean()
    found = precision_lab.explain(model, x, loss=loss)
    assert found.kind == "overflow in a square" and found.remedy is not None
    assert found.remedy.ours == "the loss of output.float(), outside of autocast"
    assert found.remedy.outcome == "finite: the operation alone, in float32"


def test_labels_of_which_none_counts() -> None:
    model = nn.Linear(2, 3)
    x, labels = torch.ones(2, 2), torch.full((2,), -100)

    def of(output: Tensor) -> Tensor:
        return functional.cross_entropy(output, labels)

    for loss in (of(model(x)), of):
        found = precision_lab.explain(model, x, loss=loss)
        assert found.kind == "bad data" and "no label counts" in found.what
        assert found.remedy is not None and found.remedy.ours.startswith('reduction="sum"')
        assert found.line is not None and found.line.text == "return functional.cross_entropy(output, labels)"


def test_a_loss_that_backward_has_freed_says_what_to_give() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(2, 2)
    loss = functional.mse_loss(model(x), LABELS)
    loss.backward()
    found = precision_lab.explain(model, x, loss=loss)
    assert found.phase == "loss" and "Give loss= as a function" in found.what


def test_a_finite_loss_is_none_of_it() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(2, 2)
    assert precision_lab.explain(model, x, loss=model(x).sum()).kind == "nothing"
