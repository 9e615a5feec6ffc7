"""A finite step that is far from float64's: the module where that begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import precision_lab


class Cancel(nn.Module):
    """The difference of two large numbers that are nearly equal."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1000) - 1000


def test_a_cancellation_is_the_first_to_be_far_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Cancel(), nn.Linear(8, 2)).half()
    x = torch.randn(4, 8).half()
    found = precision_lab.explain(model, x, loss=lambda output: output.float().square().mean())
    assert (found.kind, found.module) == ("rounding", "2")
    assert found.remedy is not None and found.remedy.ours == '"2: 32-true"'
    assert precision_lab.explain(model.float(), x.float(), loss=torch.sum).kind == "nothing"


def test_what_half_formats_cost_is_no_finding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)), nn.LayerNorm(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_lab.explain(model, torch.randn(4, 8), loss=torch.sum).kind == "nothing"
