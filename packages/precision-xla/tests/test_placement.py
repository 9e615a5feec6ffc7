"""Moving a module: what hung together before hangs together on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_xla import vendor


def fabric_of(mode: str = "32-true") -> Fabric:
    return Fabric(accelerator="cpu", strategy="xla", precision=mode)


class Marked(nn.Parameter):
    pass


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.rnn = nn.LSTM(4, 4)
        self.rnn.weight_hh_l0 = self.rnn.weight_ih_l0
        self.scale = Marked(torch.ones(4))
        self.register_buffer("shared", torch.full((4,), 2.0))
        self.a.register_buffer("again", self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.b(self.a(x)) * self.scale * self.shared)[0]


def test_ties_classes_attributes_hooks_and_gradients_are_kept() -> None:
    model = Tied()
    calls: list[str] = []
    weight: Any = model.a.weight
    weight.mark = "mine"
    handle = weight.register_hook(lambda gradient: calls.append("hook"))
    weight.register_post_accumulate_grad_hook(lambda param: calls.append("after"))
    model(torch.ones(2, 1, 4)).sum().backward()
    gradient, names = weight.grad.clone(), [name for name, _ in model.named_parameters()]
    calls.clear()

    fabric = fabric_of()
    fabric.setup(model)
    assert model.b.weight is model.a.weight and model.rnn.weight_hh_l0 is model.rnn.weight_ih_l0
    assert model.a.again is model.shared and model.shared.device == fabric.device
    assert model.rnn._flat_weights[0] is model.rnn._flat_weights[1] is model.rnn.weight_ih_l0
    assert type(model.scale) is Marked and model.a.weight.mark == "mine"
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model.a.weight.grad.cpu(), gradient)  # type: ignore[union-attr]

    x = torch.ones(2, 1, 4, device=fabric.device)
    fabric.backward(model(x).sum())
    assert calls == ["hook", "after"]
    assert torch.allclose(model.a.weight.grad.cpu(), 2 * gradient, rtol=1e-5)  # type: ignore[union-attr]
    handle.remove()
    fabric.backward(model(x).sum())
    assert calls == ["hook", "after", "after"]


def test_ties_to_a_model_that_was_set_up_before_are_kept() -> None:
    fabric, first, second = fabric_of(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    second[1].weight = first.weight
    optimizer = torch.optim.SGD([*first.parameters(), *second[0].parameters(), second[1].bias], lr=0.1)
    fabric.setup_module(first)
    fabric.setup(second, optimizer)
    assert second[1].weight is first.weight and first.weight.device == fabric.device
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in [*first.parameters(), *second.parameters()]}
    x = torch.ones(2, 4, device=fabric.device)
    fabric.backward(second(x).sum())
    alone = first.weight.grad.clone()  # type: ignore[union-attr]
    fabric.backward(first(x).sum())
    assert torch.equal(first.weight.grad, alone + 2)


def test_an_optimizer_that_has_stepped_takes_its_state_along() -> None:
    """Two steps on the CPU and two on the device are four on the CPU."""
    torch.manual_seed(0)
    x, steps = torch.randn(3, 4), []
    for moved_together in (None, True, False):
        torch.manual_seed(1)
        model = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        step_by_hand(model, optimizer, x)
        if moved_together is None:
            step_by_hand(model, optimizer, x)
        else:
            fabric = fabric_of()
            if moved_together:
                fabric.setup(model, optimizer)
            else:
                fabric.setup_module(model)
                fabric.setup_optimizers(optimizer)
            step_by_hand(model, optimizer, x.to(fabric.device))
            assert {value.device.type for value in optimizer.state[model.weight].values()} == {"cpu", "xla"}
            assert len(optimizer.state) == 2
        steps.append(model.weight.detach().cpu())
    assert torch.allclose(steps[0], steps[1], atol=1e-6) and torch.equal(steps[1], steps[2])


def step_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()


def test_a_model_built_on_the_device_stays_itself() -> None:
    fabric = fabric_of("bf16-true")
    with fabric.init_module():
        model = nn.Linear(4, 4)
    weight = model.weight
    assert fabric.setup(model).weight is weight and weight.dtype is torch.bfloat16


def test_models_without_values_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="weight, bias are on the meta device and have no values: build the model"):
        fabric_of().setup(model)
    with pytest.raises(ValueError, match=r"weight, bias have no shape yet: run one batch"):
        fabric_of().setup(nn.LazyLinear(4))


def test_embeddings_with_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^0 would have sparse gradients, and XLA has no sparse tensors: make it wi"):
        fabric_of().setup(model)
    assert model[1].weight.is_cpu
    model[0].requires_grad_(False)
    assert fabric_of().setup(model)[1].weight.device.type == "xla"


def test_fused_optimizers_are_refused_before_anything_moves() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(ValueError, match=r"AdamW\(fused=True\) has no kernel for XLA devices: leave fused out"):
        fabric_of().setup(model, optimizer)
    assert model.weight.is_cpu


def test_optimizers_that_read_values_are_named_in_the_report() -> None:
    fabric, model = fabric_of(), nn.Linear(4, 4)
    fabric.setup(model, torch.optim.Adafactor(model.parameters()))
    (note,) = fabric.precision_plugin.report.notes
    assert note == "Adafactor reads values from the device in each step: two norms of each parameter"


def test_copies_of_values_keep_ties_and_dtypes() -> None:
    fabric = fabric_of()
    a = torch.arange(3.0, device=fabric.device)
    b = a.to(torch.bfloat16)
    one, two, three = vendor.to_cpu([a, a.detach(), b])
    assert one is two and torch.equal(one, torch.arange(3.0)) and three.dtype is torch.bfloat16
    assert vendor.to_cpu([]) == []
