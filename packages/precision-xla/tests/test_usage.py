"""Usage 6 of the documented API, with the CPU for the TPU: one device here, two in test_spmd.py."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from precision_core import Fabric, Precision
from precision_xla import XLAPrecision, XLAStrategy, vendor


class Tagger(nn.Module):
    """Embedding tied to the head, a LayerNorm, a perceptron: ids (batch, length) -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.body = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(ids)))


def test_the_documented_usage_trains() -> None:
    fabric = Fabric(accelerator="cpu", strategy="xla", precision=XLAPrecision(precision="bf16-mixed"), devices=1)
    assert type(fabric.strategy) is XLAStrategy and fabric.device.type == "xla" and fabric.world_size == 1
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # made before the parameters move
    keys = list(model.state_dict())
    assert fabric.setup(model, optimizer)[0] is model
    ids = torch.arange(16, device=fabric.device).view(4, 4)
    losses = []
    for step in range(40):
        if step == 10:
            before = vendor.counts()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.detach())
    assert vendor.counts() - before == vendor.Counts(compilations=0, executions=30, reads=0)
    values = [loss.item() for loss in losses]
    assert values[-1] < 0.1 * values[0]
    assert type(model) is Tagger and list(model.state_dict()) == keys and model.head.weight is model.embedding.weight


def test_the_strategy_may_be_given_as_a_name_with_the_mode_as_a_string() -> None:
    fabric = Fabric(accelerator="cpu", strategy="xla", precision="bf16-true")
    plugin = fabric.precision_plugin
    assert type(plugin) is XLAPrecision and plugin.mode == "bf16-true"


def test_signatures_are_the_documented_ones() -> None:
    given = inspect.signature(XLAPrecision).parameters
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert {name: each.default for name, each in given.items() if each.kind in kinds} == {"precision": "32-true"}
    hooks = ("convert_module", "convert_input", "convert_output", "pre_backward", "post_backward", "forward_context")
    for name in (*hooks, "optimizer_step", "state_dict", "load_state_dict"):
        documented = inspect.signature(getattr(Precision, name)).parameters
        assert list(inspect.signature(getattr(XLAPrecision, name)).parameters) == list(documented), name


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed"])
def test_clipping_by_value_is_that_of_float64(mode: str) -> None:
    torch.manual_seed(0)
    fabric, model = Fabric(accelerator="cpu", strategy="xla", precision=mode), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(torch.linspace(-2, 2, 32, device=fabric.device).view(8, 4)).pow(2).sum())
    expected = [param.grad.double().cpu().clamp(-0.5, 0.5) for param in model.parameters()]
    assert fabric.clip_gradients(model, optimizer, clip_val=0.5) is None
    for param, clipped in zip(model.parameters(), expected, strict=True):
        assert torch.equal(param.grad.double().cpu(), clipped) and clipped.abs().max() == 0.5
