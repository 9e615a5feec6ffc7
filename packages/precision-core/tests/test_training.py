"""Training through Fabric gives what the hand-written torch loop gives, bit for bit, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from precision_core import MODES, Fabric, HalfPrecision, MixedPrecision

STEPS = 6
Make = Callable[[nn.Module], Optimizer]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 8, generator=generator)
        yield x, x.sum(1, keepdim=True)


class ByHand:
    """The loop as torch's own documentation writes it."""

    def __init__(self, mode: str) -> None:
        self.policy = MODES[mode]
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.policy.scale)

    def cast(self, model: nn.Module) -> nn.Module:
        return model if self.policy.master is not None else model.to(self.policy.params)

    def _train_masters(self, masters: nn.Module, *optimizers: Optimizer) -> list[Tensor]:
        """The optimizers step float32 weights, a model of the nearest half values computes; `masters` ends as that."""
        losses, model = [], copy.deepcopy(masters).to(self.policy.params)
        _round_into(model, masters)
        for x, target in batches():
            loss = self.loss(model, x, target)
            self.scaler.scale(loss).backward()
            for master, param in zip(masters.parameters(), model.parameters(), strict=True):
                assert param.grad is not None
                master.grad, param.grad = param.grad.float(), None
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            _round_into(model, masters)
            losses.append(loss.detach())
        for master, param in zip(masters.parameters(), model.parameters(), strict=True):
            master.data = param.data
        return losses

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", self.policy.compute) if self.policy.mixed else nullcontext()

    def loss(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        with self.context():
            output = model(x if self.policy.mixed else x.to(self.policy.params))
        return nn.functional.mse_loss(output.to(self.policy.output), target.to(self.policy.output))

    def train(self, model: nn.Module, *optimizers: Optimizer) -> list[Tensor]:
        if self.policy.master is not None:
            return self._train_masters(model, *optimizers)
        losses = []
        for x, target in batches():
            loss = self.loss(model, x, target)
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            losses.append(loss.detach())
        return losses


def _round_into(model: nn.Module, masters: nn.Module) -> None:
    """Of two bfloat16 that are equally near, the one farther from zero: a master's other 16 bits say no more."""
    with torch.no_grad():
        for param, master in zip(model.parameters(), masters.parameters(), strict=True):
            if param.dtype is torch.float16:
                param.copy_(master)
                continue
            bits = (master.view(torch.int32) + 0x8000) & -0x10000
            param.copy_(bits.view(torch.float32))


# Plain torch does not round by chance; precision/update/test_noise.py has what that mode is.
BY_HAND = [mode for mode in MODES if MODES[mode].rounding == "nearest"]


def train(fabric: Fabric, model: nn.Module, *optimizers: Optimizer) -> list[Tensor]:
    losses = []
    for x, target in fabric.setup_dataloaders(list(batches())):
        output = model(x)
        assert output.dtype is fabric.precision_plugin.policy.output
        loss = nn.functional.mse_loss(output, target.to(output.dtype))
        for optimizer in optimizers:
            optimizer.zero_grad()
        fabric.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.dtype is theirs.dtype and torch.equal(mine, theirs)


ADAM: dict[str, Any] = {"lr": 0.01, "eps": 1e-4}  # the default of 1e-8 is zero in float16


def groups(model: nn.Module) -> Optimizer:
    first, _, last = model.children()
    return AdamW(
        [{"params": first.parameters(), "lr": 0.1}, {"params": last.parameters(), "weight_decay": 0.5}], **ADAM
    )


OPTIMIZERS: dict[str, Make] = {
    "SGD with momentum": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW for": lambda model: AdamW(model.parameters(), **ADAM, foreach=False, fused=False),
    "AdamW foreach": lambda model: AdamW(model.parameters(), **ADAM, foreach=True),
    "AdamW fused": lambda model: AdamW(model.parameters(), **ADAM, fused=True),
    "param groups": groups,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("mode", BY_HAND)
def test_as_the_hand_written_loop(mode: str, make: Make) -> None:
    reference, by_hand = net(), ByHand(mode)
    expected = by_hand.train(by_hand.cast(reference), make(reference))
    fabric, model = Fabric(accelerator="cpu", precision=mode), net()
    losses = train(fabric, *fabric.setup(model, make(model)))
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same(model, reference)
    plugin = fabric.precision_plugin
    assert plugin.steps + plugin.skipped_steps == STEPS and plugin.scale == by_hand.scaler.get_scale()


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed", "64-true"])
def test_several_optimizers(mode: str) -> None:
    def make(model: nn.Module) -> list[Optimizer]:
        first, _, last = model.children()
        return [SGD(first.parameters(), lr=0.05, momentum=0.9), Adam(last.parameters(), lr=0.01)]

    reference, by_hand = net(), ByHand(mode)
    expected = by_hand.train(by_hand.cast(reference), *make(reference))
    fabric, model = Fabric(accelerator="cpu", precision=mode), net()
    losses = train(fabric, *fabric.setup(model, *make(model)))
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same(model, reference)


@pytest.mark.parametrize("mode", BY_HAND)
def test_a_closure_runs_once_and_its_true_loss_comes_back(mode: str) -> None:
    reference, by_hand = net(), ByHand(mode)
    expected = by_hand.train(by_hand.cast(reference), SGD(reference.parameters(), lr=0.05))
    fabric, model = Fabric(accelerator="cpu", precision=mode), net()
    _, optimizer = fabric.setup(model, SGD(model.parameters(), lr=0.05))
    for (x, target), loss in zip(batches(), expected, strict=True):

        def closure(x: Tensor = x, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            output = model(x)
            loss = nn.functional.mse_loss(output, target.to(output.dtype))
            fabric.backward(loss)
            return loss

        assert torch.equal(optimizer.step(closure), loss)
    assert_same(model, reference)


@pytest.mark.parametrize("mode", ["64-true", "bf16-true", "16-mixed"])
def test_an_optimizer_that_has_stepped_before_setup(mode: str) -> None:
    def stepped() -> tuple[nn.Module, Optimizer]:
        model = net()
        optimizer = Adam(model.parameters(), lr=0.01)
        ByHand("32-true").train(model, optimizer)
        return model, optimizer

    dtype = MODES[mode].params
    reference, optimizer = stepped()
    by_hand = ByHand(mode)
    by_hand.cast(reference)
    for state in optimizer.state.values():
        state.update({key: state[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")})
    expected = by_hand.train(reference, optimizer)
    fabric = Fabric(accelerator="cpu", precision=mode)
    model, optimizer = fabric.setup(*stepped())
    losses = train(fabric, model, optimizer)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same(model, reference)
    steps = [state["step"] for state in optimizer.state.values()]
    assert {step.item() for step in steps} == {STEPS + fabric.precision_plugin.steps}
    assert {step.dtype for step in steps} == {torch.float32}  # bfloat16 would count to 256


@pytest.mark.parametrize("mode", list(MODES))
def test_manual_autocast_around_model_and_loss(mode: str) -> None:
    """A loop that already has autocast in it goes on working, and gains nothing and loses nothing by it."""
    fabric, model = Fabric(accelerator="cpu", precision=mode), net()
    _, optimizer = fabric.setup(model, SGD(model.parameters(), lr=0.05))
    plain = copy.deepcopy(model)
    for x, target in batches():
        with fabric.autocast():
            loss = nn.functional.mse_loss(model(x), target.to(MODES[mode].output))
        assert torch.equal(loss, nn.functional.mse_loss(plain(x), target.to(MODES[mode].output)))
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("mode", list(MODES))
def test_accumulation_is_the_gradient_of_the_sum(mode: str) -> None:
    x, target = torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()])
    reference = net().double()
    nn.functional.mse_loss(reference(x.double()), target.double()).backward()
    is_left_scaled = mode == "16-master"  # and beyond float16 under the first scale
    precision = HalfPrecision(mode, scaler={"init_scale": 16.0}) if is_left_scaled else mode
    fabric, model = Fabric(accelerator="cpu", precision=precision), net()
    _, optimizer = fabric.setup(model, SGD(model.parameters(), lr=1.0))
    for part, goal in batches():
        output = model(part)
        with fabric.no_backward_sync(model):
            fabric.backward(nn.functional.mse_loss(output, goal.to(output.dtype)) / STEPS)
    if not is_left_scaled:
        fabric.precision_plugin.unscale_gradients(optimizer)
    factor = 1 / fabric.precision_plugin.scale if is_left_scaled else 1.0
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(MODES[mode].compute, 0.05)
    for mine, exact in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and exact.grad is not None
        assert (mine.grad.double() * factor - exact.grad).norm() <= tolerance * exact.grad.norm()


def test_the_first_overflow_is_skipped_as_by_torchs_scaler() -> None:
    plugin = MixedPrecision("16-mixed", device="cpu", scaler={"init_scale": 2.0**40})
    fabric, model = Fabric(accelerator="cpu", precision=plugin), net()
    reference, by_hand = net(), ByHand("16-mixed")
    by_hand.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    by_hand.train(reference, Adam(reference.parameters(), lr=0.01))
    train(fabric, *fabric.setup(model, Adam(model.parameters(), lr=0.01)))
    assert plugin.skipped_steps == STEPS and plugin.scale == by_hand.scaler.get_scale() == 2.0**34
    assert_same(model, net())
    assert_same(reference, net())
