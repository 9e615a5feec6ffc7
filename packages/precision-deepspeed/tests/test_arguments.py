"""Models and optimizers that an engine cannot take are refused at setup, by name, and the others step as torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_deepspeed import DeepSpeedStrategy

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Net(nn.Module):
    """Frozen and unused parameters, a buffer that forward changes, and a forward that may fail."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.unused, self.frozen = (nn.Linear(4, 4) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(self.frozen(x))))
        if x.isnan().any():
            raise ArithmeticError
        return self.last(x)


def groups(make: Any, **options: Any) -> MakeOptimizer:
    """Returns what makes the optimizer with two groups, each with a learning rate of its own."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, param in model.named_parameters():
            split["bias" in name].append(param)
        made: torch.optim.Optimizer = make(
            [{"params": split[True], "lr": 0.05}, {"params": split[False], "lr": 0.01}], **options
        )
        return made

    return build


def trained(model: Net, optimizer: Any, fabric: Fabric | None) -> dict[str, Tensor]:
    """Returns the parameters after three steps with a scheduler, evaluation and a forward that fails in between."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=step > 0)
        model.eval()
        with pytest.raises(ArithmeticError):
            model(rows * float("nan"))
        with torch.no_grad():
            model(rows)
        model.train()
        loss = model(rows).pow(2).mean() + model(rows * 2).pow(2).mean()
        loss.backward() if fabric is None else fabric.backward(loss)
        optimizer.step()
        scheduler.step()
    if fabric is None:
        return {name: param.detach() for name, param in model.named_parameters()}
    with fabric.strategy.gathered(model):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": groups(torch.optim.AdamW, weight_decay=0.0),  # it would decay what is not used: see the README
    "SGD": groups(torch.optim.SGD, momentum=0.9),
    "RMSprop": groups(torch.optim.RMSprop),
    "Adagrad": groups(torch.optim.Adagrad),
}


def step_as_torch(stage: int) -> None:
    for name, make in OPTIMIZERS.items():
        model = Net()
        optimizer = make(model)
        strategy = DeepSpeedStrategy(stage, offload_optimizer=stage == 2)
        fabric = Fabric(accelerator="cpu", strategy=strategy)
        if stage > 0 and name == "Adagrad":
            with pytest.raises(ValueError, match="an Adagrad of its own"):
                fabric.setup(model, optimizer)
            continue
        fabric.setup(model, optimizer)
        mine = trained(model, optimizer, fabric)
        reference = Net()
        for key, value in trained(reference, make(reference), None).items():
            torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=1e-7, msg=f"{name} {key}")
        fabric.teardown()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizers_with_groups_and_schedulers_step_as_torch_does(stage: int) -> None:
    run_in_ranks(1, step_as_torch, stage)


def parameters_are_named() -> None:
    model = Net()
    model.scale = nn.Parameter(torch.tensor(1.0))
    fabric = Fabric(accelerator="cpu", strategy="deepspeed")
    with pytest.raises(ValueError, match=r"\['scale'\] the shape \(1,\)"):
        fabric.setup(model, torch.optim.SGD(model.parameters()))
    model = Net()
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(3))
    with pytest.raises(ValueError, match=r"'first\.weight'.*in no group.*no\s*checkpoint"):
        fabric.setup(model, torch.optim.SGD(model.last.parameters()))


def test_parameters_that_an_engine_cannot_hold_are_named() -> None:
    run_in_ranks(1, parameters_are_named)


@pytest.mark.parametrize(
    ("devices", "visible", "wanted"),
    [
        ([1], None, "CUDA_VISIBLE_DEVICES=1 and pass devices=1"),
        ([1], "4,6", "CUDA_VISIBLE_DEVICES=6 and pass devices=1"),
        ([1, 0], None, "CUDA_VISIBLE_DEVICES=1,0 and pass devices=2"),
    ],
)
def test_gpus_are_those_of_the_local_ranks(
    devices: list[int], visible: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed puts models on the GPU of the local rank's number: batches would go to another one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=wanted):
        Fabric("gpu", DeepSpeedStrategy(), devices=devices)


@pytest.mark.parametrize("devices", [[0, 1], 2, "auto"])
def test_gpus_in_the_order_of_the_ranks_are_taken(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    strategy = DeepSpeedStrategy()
    assert list(strategy.lay_out("gpu", devices, 1).indices) == [0, 1]
    assert strategy.device == torch.device("cuda:0")
