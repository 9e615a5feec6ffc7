"""What `fabric.backward` cannot start from is refused before anything is scaled, by what it is and with the way out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a number": (lambda y: y.sum().item(), r"got a float\. Numbers have no graph: call it before \.item\(\)"),
    "numpy's": (lambda y: numpy.float32(y.sum().item()), r"got a float32\. Numbers have no graph"),
    "none": (lambda _: None, "got None. Was the loss computed and returned"),
    "a list": (lambda y: [y.sum()], r"got a list\. .*fabric\.backward\(sum\(losses\)\)"),
    "an output": (lambda y: SimpleNamespace(loss=y.sum()), r"got a SimpleNamespace\. .*\(output\.loss\)"),
    "a dict": (lambda y: {"loss": y.sum()}, r"got a dict\. Pass output\[\"loss\"\]"),
    "detached": (lambda y: y.sum().detach(), r"has no graph: was it computed under torch\.no_grad\(\), detached"),
    "made anew": (lambda y: torch.tensor(y.sum().item()), r"has no graph.*torch\.tensor\(\.\.\.\)"),
    "a count": (lambda y: (y > 0).sum(), r"has no graph: it is int64"),
    "several": (lambda y: y, r"this one has shape \(3, 2\): reduce it with loss\.mean\(\)"),
}


@pytest.mark.parametrize("mode", ["32-true", "16-mixed"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_backward(mode: str, what: str) -> None:
    make, message = REFUSED[what]
    fabric = Fabric(accelerator="cpu", precision=mode)
    model, optimizer = fabric.setup(layer := nn.Linear(2, 2), torch.optim.SGD(layer.parameters(), lr=0.5))
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"fabric\.backward expects the loss.*{message}"):
        fabric.backward(make(model(torch.ones(3, 2))))
    fabric.backward(model(torch.ones(3, 2)).mean())  # nothing was scaled, or left half done
    optimizer.step()
    assert torch.allclose(model.weight, before - 0.25)


def test_disabled_gradients_are_said() -> None:
    fabric = Fabric(accelerator="cpu")
    model = fabric.setup(nn.Linear(2, 2))
    with torch.no_grad(), pytest.raises(ValueError, match=r"gradients are disabled here \(torch\.no_grad\(\)\)"):
        fabric.backward(model(torch.ones(1, 2)).sum())
    with torch.inference_mode():
        loss = model(torch.ones(1, 2)).sum()
    with pytest.raises(ValueError, match=r"torch\.inference_mode\(\)"):
        fabric.backward(loss)


def test_a_gradient_may_be_given() -> None:
    fabric = Fabric(accelerator="cpu")
    model = fabric.setup(nn.Linear(2, 2))
    x, gradient = torch.ones(3, 2), torch.full((3, 2), 0.5)
    fabric.backward(model(x), gradient)
    fabric.backward(model(x), gradient=gradient)
    fabric.backward(model(x).sum().view(1, 1), None, False)
    assert torch.equal(model.bias.grad, torch.full((2,), 3 * 0.5 * 2 + 3.0))
    with pytest.raises(ValueError, match="this one has shape"):
        fabric.backward(model(x), None)
