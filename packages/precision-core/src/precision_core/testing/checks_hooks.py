"""The hooks of a plugin, called by a strategy and by a hand-written loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from precision_core.precision.model.report import module_bytes
from precision_core.scaling.master_scaler import MasterScaler
from precision_core.testing.checks_loop import train_net as train
from precision_core.testing.checks_state import assert_equal
from precision_core.testing.net import loss_of, make_batch

if TYPE_CHECKING:
    from precision_core.testing.contract import PrecisionContract

_SETUP = ["connect", "convert_module"]
_STEP = [
    "convert_input",
    "forward_context",
    "convert_output",
    "pre_backward",
    "backward",
    "post_backward",
    "clip_gradients",
    "optimizer_step",
]


def hooks_run_in_order(kit: PrecisionContract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    plugin = fabric.precision_plugin
    called: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        hook = getattr(plugin, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return hook(*args, **kwargs)

        return run

    for name in (*_SETUP, *_STEP):
        setattr(plugin, name, spy(name))
    fabric.strategy.connect(plugin)
    optimizer = kit.make_optimizer(model)
    fabric.setup(model, optimizer)
    assert [name for name in called if name in _SETUP] == _SETUP
    for step in range(2):
        called.clear()
        batch, target = make_batch(step, device=fabric.device)
        fabric.backward(loss_of(model(batch), target))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        assert called == _STEP


def a_loop_by_hand_equals_fabric(kit: PrecisionContract) -> None:
    fabric, model, optimizer = kit.setup()
    expected = train(fabric, model, optimizer, range(10))

    plugin, by_hand = kit.make_fabric().precision_plugin, kit.make_model()
    mine = kit.make_optimizer(by_hand)
    assert plugin.convert_module(by_hand) is by_hand
    by_hand.to(fabric.device)
    plugin.register_optimizers(mine)
    losses = []
    for step in range(10):
        batch, target = make_batch(step, device=fabric.device)
        mine.zero_grad()
        with plugin.forward_context():
            output = by_hand(plugin.convert_input(batch))
        loss = loss_of(plugin.convert_output(output), target)
        scaled = plugin.pre_backward(loss, by_hand)
        plugin.backward(scaled, by_hand)
        assert torch.equal(plugin.post_backward(scaled, by_hand), loss)
        plugin.optimizer_step(mine, by_hand, None)
        losses.append(loss.item())
    assert losses == expected
    assert_equal(kit.values(by_hand), kit.values(model))


def gradients_are_unscaled_once_they_are_asked_for(kit: PrecisionContract) -> None:
    fabric, model = kit.make_fabric(), kit.make_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    fabric.setup(model, optimizer)
    batch, target = make_batch(0, device=fabric.device)
    plugin = fabric.precision_plugin
    for _ in range(30):  # a loss scale may have to fall first
        optimizer.zero_grad()
        fabric.backward(loss_of(model(batch), target))
        factor = 1.0
        if isinstance(plugin.scaler, MasterScaler):  # which leaves them scaled
            with pytest.raises(RuntimeError, match=f"{plugin.mode} leaves float16 gradients scaled until the step"):
                plugin.unscale_gradients(optimizer)
            factor = 1 / plugin.scale
        else:
            for _ in range(2):  # a second call must not divide again
                plugin.unscale_gradients(optimizer)
        named = list(model.named_parameters())
        gradients = {name: param.grad.double() * factor for name, param in named if param.grad is not None}
        before = kit.values(model)
        optimizer.step()
        if not plugin.last_step_skipped:
            break
    after = kit.values(model)
    moved = torch.stack([(before[name] - after[name]).norm() for name in gradients]).norm()
    true = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert gradients and moved.item() == pytest.approx(true.item(), rel=kit.tolerance)


def a_step_returns_the_closures_unscaled_loss(kit: PrecisionContract) -> None:
    fabric, model, optimizer = kit.setup()
    batch, target = make_batch(0, device=fabric.device)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(loss_of(model(batch), target))
        fabric.backward(losses[-1])
        return losses[-1]

    for _ in range(3):  # one of them skipped, perhaps
        returned: Any = optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, and returns what it returns
        assert torch.equal(torch.as_tensor(returned), losses[-1])
    assert len(losses) == 3


def conversion_leaves_a_report(kit: PrecisionContract) -> None:
    plugin, model = kit.make_fabric().precision_plugin, kit.make_model()
    before = module_bytes(model)
    converted = plugin.convert_module(model)
    report = plugin.report
    assert report.mode == plugin.mode and report.mode in str(report)
    assert (report.bytes_before, report.bytes_after) == (before, module_bytes(converted))
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())}
    assert {item.name for item in (*report.converted, *report.skipped)} <= names


def teardown_gives_the_model_back(kit: PrecisionContract) -> None:
    fabric, model, optimizer = kit.setup()
    train(fabric, model, optimizer, range(2))
    fabric.teardown()
    overridden = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert not overridden and "step" not in vars(optimizer)
