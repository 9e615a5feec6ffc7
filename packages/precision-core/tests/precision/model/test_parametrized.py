"""Parametrised layers under half modes: what cannot compute there is named at setup."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from precision_core import Fabric


class Square(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(weight)


def inverse(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Square())
    return layer


KINDS: dict[str, Any] = {
    "matrix_exp": (parametrizations.orthogonal, "its gradients are not finite"),
    "cayley": (lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"), "not implemented"),
    "householder": (lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"), "not implemented"),
    "the user's own": (inverse, "Low precision dtypes not supported"),
}


def model(parametrized: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), parametrized(nn.Linear(8, 8)))


@pytest.mark.parametrize("mode", ["bf16-true", "16-true"])
@pytest.mark.parametrize(("kind", "reason"), KINDS.values(), ids=KINDS)
def test_layers_without_finite_gradients_are_named_with_a_way_out_that_works(mode: str, kind: Any, reason: str) -> None:
    net = model(kind)
    with pytest.raises(ValueError) as error:
        Fabric(accelerator="cpu", precision=mode).setup(net)
    assert str(error.value).startswith("1 (ParametrizedLinear): its parametrisation of 'weight' cannot run in ")
    assert reason in str(error.value) and f'"{mode}; 1: 32-true"' in str(error.value)
    assert {param.dtype for param in net.parameters()} == {torch.float32}  # nothing was changed
    fabric = Fabric(accelerator="cpu", precision=f"{mode}; 1: 32-true")
    net = fabric.setup(net)
    fabric.backward(net(torch.ones(2, 8)).sum())
    assert all(param.grad.isfinite().all() for param in net.parameters())


@pytest.mark.filterwarnings("ignore:.*casts buffers")
@pytest.mark.parametrize("mode", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_those_that_can_run_do(mode: str, kind: Any) -> None:
    fabric, net = Fabric(accelerator="cpu", precision=mode), model(kind)
    state = {name: value.clone() for name, value in net.state_dict().items() if "_u" in name}
    net = fabric.setup(net)
    now = net.state_dict()
    assert all(torch.equal(now[name], value.to(now[name].dtype)) for name, value in state.items())  # a copy was tried
    fabric.backward(net(torch.ones(2, 8)).sum())
    assert all(param.grad.isfinite().all() for param in net.parameters())
