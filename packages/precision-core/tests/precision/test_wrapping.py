"""Wrapping: what a plugin does not override is the wrapped one's; and parameters that no cast reaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from precision_core import Fabric, HalfPrecision, MixedPrecision, Policy, Precision, Report
from precision_core.precision import Wrapping, hidden_parameters, make_plugin


class Wraps(Wrapping):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.policy = Policy.parse(mode)
        self.wrapped = make_plugin(self.policy, "cpu")


class Negating(Wrapping):
    """Overrides one hook."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped: Precision = HalfPrecision("bf16-true")
        self.policy = self.wrapped.policy

    def convert_output(self, data: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return -super().convert_output(data)


def trained(precision: str | Precision) -> tuple[list[torch.Tensor], Report, Fabric]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", precision=precision)
    with fabric.init_module():
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    model, optimizer = fabric.setup(model, SGD(model.parameters(), lr=0.1))
    for x in torch.randn(3, 5, 4):
        fabric.backward(model(x).pow(2).mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        optimizer.zero_grad()
    outputs = [model(torch.ones(1, 4)), *model.parameters()]
    return outputs, fabric.precision_plugin.report, fabric


@pytest.mark.parametrize("mode", ["bf16-true", "bf16-mixed", "16-mixed; 1: 32-true", "64-true"])
def test_it_runs_as_what_it_wraps(mode: str) -> None:
    (expected, report, plain), (found, wrapped_report, fabric) = trained(mode), trained(Wraps(mode))
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(found, expected, strict=True))
    plugin = fabric.precision_plugin
    assert wrapped_report == report and plugin.steps >= 2 and plugin.scale == plain.precision_plugin.scale
    assert plugin.state_dict() == plain.precision_plugin.state_dict()
    assert plugin.name_of(found[1]) == "0.weight"  # type: ignore[arg-type]
    fabric.teardown()


def test_what_is_overridden_is_its_own() -> None:
    expected, found = trained("bf16-true")[0][0], Negating()
    found.wrapped.connect(Fabric(accelerator="cpu").strategy)
    assert torch.equal(found.convert_output(expected.bfloat16()), -expected.bfloat16().float())
    assert found.storage(nn.Parameter(torch.ones(1))) is torch.bfloat16


def test_it_gives_back_what_the_wrapped_one_put_on_a_module_and_refuses_what_that_refuses() -> None:
    plugin = Wraps("bf16-mixed; 0: 32-true")
    model = plugin.convert_module(nn.Sequential(nn.Linear(1, 1)))
    assert "forward" in vars(model[0])
    plugin.teardown()
    assert "forward" not in vars(model[0])
    refused = Adam(nn.Linear(1, 1).parameters(), eps=1e-8)
    with pytest.raises(ValueError, match="eps"):
        Wraps("16-true").register_optimizers(refused)
    with pytest.raises(ValueError, match="trains float32 parameters"):
        Wraps("bf16-mixed").convert_module(nn.Linear(1, 1).half())
    assert isinstance(Wraps("bf16-mixed").wrapped, MixedPrecision)


def test_hidden_parameters_are_reached_by_no_cast_and_come_back_in_their_order() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    packed, names = model[0].weight, [name for name, _ in model.named_parameters()]
    with hidden_parameters(model, lambda param: param is packed):
        assert [name for name, _ in model.named_parameters()] == ["0.bias", "1.weight", "1.bias"]
        model.to(torch.bfloat16)
    assert model[0].weight is packed and [name for name, _ in model.named_parameters()] == names
    assert {param.dtype for param in model.parameters() if param is not packed} == {torch.bfloat16}
    assert packed.dtype is torch.float32
    with pytest.raises(KeyError), hidden_parameters(model, lambda param: True):
        raise KeyError
    assert [name for name, _ in model.named_parameters()] == names
