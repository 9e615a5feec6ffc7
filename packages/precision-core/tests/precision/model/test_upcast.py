"""Fabric(upcast=True): checkpoints that arrive in a half dtype train in float32 under mixed modes, by value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_core import Fabric, MixedPrecision


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def train(fabric: Fabric, net: nn.Module) -> list[torch.Tensor]:
    _, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=2.0**-12))
    for seed in range(3):
        optimizer.zero_grad()
        fabric.backward(net(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).pow(2).mean())
        optimizer.step()
    return list(net.parameters())


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("arrives", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_trains_as_the_float32_model_of_the_same_values(mode: str, arrives: torch.dtype) -> None:
    net = model(arrives)
    reference = model(arrives).float()
    fabric = Fabric(accelerator="cpu", precision=mode, upcast=True)
    trained = train(fabric, net)
    for param, expected in zip(trained, train(Fabric(accelerator="cpu", precision=mode), reference), strict=True):
        assert param.dtype is torch.float32 and torch.equal(param, expected)
    report = fabric.precision_plugin.report
    assert len(report.converted) == 6 and report.bytes_after == 38 * 4
    assert report.bytes_before == 38 * arrives.itemsize


def test_frozen_matrices_and_exceptions_stay() -> None:
    net = model(torch.bfloat16)
    net[0].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    Fabric(accelerator="cpu", precision="bf16-mixed; 2: bf16-true", upcast=True).setup(net)
    dtypes = {name: param.dtype for name, param in net.named_parameters()}
    half = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {name for name, dtype in dtypes.items() if dtype is torch.bfloat16} == half


def test_without_it_the_error_names_it() -> None:
    message = r'0\.weight \(bfloat16\).*pass Fabric\(precision="bf16-mixed", upcast=True\), or without Fabric MixedPrec'
    with pytest.raises(ValueError, match=message):
        Fabric(accelerator="cpu", precision="bf16-mixed").setup(model(torch.bfloat16))


@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "64-true"])
def test_true_modes_refuse_it(mode: str) -> None:
    with pytest.raises(ValueError, match=rf'Fabric\(precision="{mode}", upcast=True\): {mode} casts'):
        Fabric(accelerator="cpu", precision=mode, upcast=True)


def test_it_goes_with_a_plugin_of_ones_own() -> None:
    precision = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 64.0})
    net = model(torch.float16)
    Fabric(accelerator="cpu", precision=precision, upcast=True).setup(net)
    assert {param.dtype for param in net.parameters()} == {torch.float32}
