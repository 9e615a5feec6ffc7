"""What was not finite before the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import precision_lab


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, batch: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        x = self.layer(batch["x"]) + self.shift
        return torch.softmax(x + mask, -1) if mask is not None else x


def test_a_batch_in_a_dict_and_a_mask_of_infinity() -> None:
    model = Model()
    x = torch.ones(3, 4)
    mask = torch.tensor([0.0, -torch.inf])
    assert precision_lab.explain(model, ({"x": x},), {"mask": mask}, loss=torch.sum).kind == "nothing"
    x[1] = torch.nan
    found = precision_lab.explain(model, ({"x": x},), {"mask": mask}, loss=torch.sum)
    assert (found.kind, found.name) == ("bad data", "input 0") and "in rows 1 of 3" in found.what
    assert found.remedy is not None and "torch.isfinite(x)" in found.remedy.ours
    assert bool(x[1].isnan().all())


def test_a_buffer_and_a_parameter_beyond_the_format() -> None:
    model = Model()
    model.shift[0] = torch.nan
    found = precision_lab.explain(model, ({"x": torch.ones(3, 4)},), loss=torch.sum)
    assert (found.kind, found.name) == ("a buffer that was not finite", "shift")
    model = Model()
    with torch.no_grad():
        model.layer.weight[0, 0] = 1e6
    found = precision_lab.explain(model.half(), ({"x": torch.ones(3, 4).half()},), loss=torch.sum)
    assert found.name == "layer.weight" and "beyond float16's range when the model was cast" in found.what


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_the_loss_sent(value: float) -> None:
    gradient = torch.ones(3, 2)
    gradient[0, 0] = value
    found = precision_lab.explain(Model(), ({"x": torch.ones(3, 4)},), output_gradients=gradient)
    assert found.kind == "the loss's gradient" and found.phase == "loss"
