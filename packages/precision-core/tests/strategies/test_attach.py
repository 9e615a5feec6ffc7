"""Attached: what setup puts on a model and its optimizers, and gives back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from precision_core import Fabric, Precision
from precision_core.surgery.replace import Replacement, replace_layers


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubles(Precision):
    """Replaces every linear layer by one of another class with parameters of its own."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        def make(layer: nn.Module) -> nn.Module:
            new = Doubled(layer.in_features, layer.out_features)  # type: ignore[arg-type]
            new.load_state_dict(layer.state_dict())
            return new

        surgery = replace_layers(module, {nn.Linear: Replacement(make)})
        return super().convert_module(surgery.module)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("root", [True, False])
def test_an_optimizer_made_before_setup_trains_layers_that_setup_replaced(root: bool, together: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(3, 1) if root else nn.Sequential(nn.Linear(3, 1))
    optimizer, fabric = Adam(model.parameters(), lr=0.1), Fabric(accelerator="cpu", precision=Doubles())
    x = torch.randn(8, 3)
    expected = 2 * model(x)
    if together:
        ready, returned = fabric.setup(model, optimizer)
        assert returned is optimizer
    else:
        ready = fabric.setup_module(model)
        assert fabric.setup_optimizers(optimizer) is optimizer
    assert type(ready if root else ready[0]) is Doubled and (ready is model) is not root
    assert torch.equal(ready(x), expected)
    assert [id(param) for param in optimizer.param_groups[0]["params"]] == [id(param) for param in ready.parameters()]
    fabric.backward(ready(x).pow(2).mean())
    optimizer.step()
    assert ready(x).pow(2).mean() < expected.pow(2).mean()


def test_an_optimizer_with_state_for_a_layer_that_setup_replaced_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer = Adam(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="make the optimizer after setup, or convert the model first"):
        Fabric(accelerator="cpu", precision=Doubles()).setup(model, optimizer)


def test_a_compiled_model_that_is_replaced_as_a_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="set it up first, then compile what"):
        Fabric(accelerator="cpu", precision=Doubles()).setup(torch.compile(nn.Linear(3, 1), backend="eager"))


def test_a_setup_that_fails_undoes_itself_alone() -> None:
    class Refuses(SGD):
        def add_param_group(self, param_group: dict[str, object]) -> None:
            super().add_param_group(param_group)
            self.state[param_group["params"][0]] = {"buffer": 1}  # which keeps it from following a replaced layer

    host = Fabric(accelerator="cpu", precision=Doubles())
    first, second = nn.Sequential(nn.Linear(3, 1)), nn.Sequential(nn.Linear(3, 1))
    optimizers = [SGD(first.parameters(), lr=1.0), SGD(second.parameters(), lr=1.0)]
    host.setup(first, optimizers[0])
    with pytest.raises(ValueError, match="make the optimizer after setup"):
        host.setup(second, optimizers[1], Refuses(second.parameters(), lr=1.0))
    assert not {"forward", "_apply"} & vars(second).keys() and "step" not in vars(optimizers[1])
    assert {"forward", "_apply"} <= vars(first).keys() and "step" in vars(optimizers[0])
    host.teardown()
    assert not {"forward", "_apply"} & vars(first).keys() and "step" not in vars(optimizers[0])
