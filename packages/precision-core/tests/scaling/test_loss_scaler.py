"""The named cases of loss scaling, by value: two optimizers, accumulation, dropped batches, overflows in between.

The loss `(w * c).sum()` has the gradient `c` exactly, and SGD with learning rate 1 subtracts it, so every parameter
below shows which gradients reached it, and how often they were divided by the scale.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.optim import SGD

from precision_core import MixedPrecision

INF = float("inf")


def make(**scaler: float) -> MixedPrecision:
    options = {"init_scale": 8.0, "growth_interval": 1000, **scaler}
    return MixedPrecision("16-mixed", device="cpu", scaler=options)


def weight(value: float = 0.0) -> tuple[nn.Parameter, SGD]:
    param = nn.Parameter(torch.tensor([value]))
    return param, SGD([param], lr=1.0)


def backward(plugin: MixedPrecision, *terms: tuple[nn.Parameter, float]) -> None:
    loss = sum((param * c).sum() for param, c in terms)
    plugin.backward(plugin.pre_backward(loss, None), None)


def step(plugin: MixedPrecision, optimizer: SGD) -> None:
    plugin.optimizer_step(optimizer, None, None)
    optimizer.zero_grad()


def test_two_optimizers_both_clipped_then_both_stepped() -> None:
    plugin, (a, opt_a), (b, opt_b) = make(), weight(), weight()
    plugin.register_optimizers(opt_a, opt_b)
    for iteration in (1, 2):
        backward(plugin, (a, 3.0), (b, 0.5))
        assert plugin.clip_gradients(None, opt_a, max_norm=1.0) == 3.0
        assert plugin.clip_gradients(None, opt_b, max_norm=1.0) == 0.5
        step(plugin, opt_a)
        step(plugin, opt_b)
        assert a.item() == pytest.approx(-iteration, abs=1e-5)
        assert b.item() == -0.5 * iteration
    assert (plugin.steps, plugin.skipped_steps, plugin.scale) == (4, 0, 8.0)


@pytest.mark.parametrize("registered", [True, False])
def test_the_first_of_two_optimizers_overflows(registered: bool) -> None:
    plugin, (a, opt_a), (b, opt_b) = make(), weight(), weight()
    if registered:
        plugin.register_optimizers(opt_a, opt_b)
    backward(plugin, (a, INF), (b, 2.0))
    step(plugin, opt_a)
    step(plugin, opt_b)
    assert (a.item(), b.item()) == (0.0, -2.0)  # b's gradient carried the old scale, and was divided by it
    assert plugin.scale == 4.0


def test_the_scale_grows_while_another_optimizer_accumulates() -> None:
    plugin, (a, opt_a), (b, opt_b) = make(growth_interval=1), weight(), weight()
    plugin.register_optimizers(opt_a, opt_b)
    for _ in range(3):
        backward(plugin, (a, 1.0), (b, 0.25))
        step(plugin, opt_a)
    assert plugin.scale == 64.0  # grew after each step of a: 8, 16, 32, 64
    step(plugin, opt_b)
    assert (a.item(), b.item()) == (-3.0, -0.75)


def test_the_scale_falls_while_another_optimizer_accumulates() -> None:
    plugin, (a, opt_a), (b, opt_b) = make(), weight(), weight()
    plugin.register_optimizers(opt_a, opt_b)
    for c in (INF, 1.0, 1.0):
        backward(plugin, (a, c), (b, 0.25))
        step(plugin, opt_a)
    step(plugin, opt_b)
    assert (a.item(), b.item(), plugin.scale) == (-2.0, -0.75, 4.0)


def test_gradients_that_an_engine_holds_back_follow_the_scale() -> None:
    plugin, (a, opt_a), (b, opt_b) = make(growth_interval=1), weight(), weight()
    plugin.register_optimizers(opt_a, opt_b)
    held: list[torch.Tensor] = []
    plugin.scaler.unsynced = lambda: held
    for c in (1.0, 1.0, INF):
        backward(plugin, (a, c), (b, 0.25))
        assert b.grad is not None
        held.append(b.grad)
        b.grad = None
        step(plugin, opt_a)
    assert plugin.scale == 16.0  # 8, 16, 32, and half of that
    b.grad = torch.stack(held).sum(0)
    step(plugin, opt_b)
    assert (a.item(), b.item()) == (-2.0, -0.75)


def test_a_newcomer_is_brought_to_the_current_scale() -> None:
    plugin, (a, opt_a), (b, opt_b) = make(), weight(), weight()
    backward(plugin, (a, INF), (b, 2.0))
    step(plugin, opt_a)
    assert plugin.scale == 4.0  # b's optimizer is not known yet, its gradient carries 8
    step(plugin, opt_b)
    assert b.item() == -2.0


def test_clipped_then_dropped() -> None:
    plugin, (a, opt_a) = make(growth_interval=2), weight()
    backward(plugin, (a, 100.0))
    plugin.clip_gradients(None, opt_a, max_norm=1.0)
    opt_a.zero_grad()
    backward(plugin, (a, 0.5))
    step(plugin, opt_a)
    assert a.item() == -0.5
    assert plugin.scale == 8.0  # the dropped batch is no good step: growth would have come with the second


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_dropped_overflow_still_lowers_the_scale(set_to_none: bool) -> None:
    plugin, (a, opt_a) = make(), weight()
    backward(plugin, (a, INF))
    plugin.clip_gradients(None, opt_a, max_norm=1.0)
    opt_a.zero_grad(set_to_none=set_to_none)
    backward(plugin, (a, 0.5))
    assert plugin.scale == 4.0
    step(plugin, opt_a)
    assert (a.item(), plugin.scale, plugin.skipped_steps) == (-0.5, 4.0, 0)


def test_backward_after_clip_within_one_accumulation() -> None:
    plugin, (a, opt_a) = make(growth_interval=2), weight()
    for _ in range(2):
        backward(plugin, (a, 4.0))
        plugin.clip_gradients(None, opt_a, max_norm=1.0)  # 4 -> 1, then 1 + 4 -> 1
    backward(plugin, (a, 0.25))
    step(plugin, opt_a)
    assert a.item() == pytest.approx(-1.25, abs=1e-5)
    assert plugin.scale == 8.0


def test_backward_after_an_overflow_was_clipped_skips_once() -> None:
    plugin, (a, opt_a) = make(), weight()
    backward(plugin, (a, INF))
    plugin.clip_gradients(None, opt_a, max_norm=1.0)
    backward(plugin, (a, 1.0))
    step(plugin, opt_a)
    assert (a.item(), plugin.scale, plugin.skipped_steps) == (0.0, 4.0, 1)


def test_accumulation_is_a_plain_sum() -> None:
    plugin, (a, opt_a) = make(), weight()
    for c in (1.0, 2.0, 4.0):
        backward(plugin, (a, c))
    assert a.grad is not None and a.grad.item() == 7.0 * 8.0  # scaled until someone needs it
    plugin.unscale_gradients(opt_a)
    plugin.unscale_gradients(opt_a)
    assert a.grad.item() == 7.0
    step(plugin, opt_a)
    assert a.item() == -7.0


def test_gradients_left_from_a_step_are_added_to_as_without_scaling() -> None:
    plugin, (a, opt_a) = make(), weight()
    backward(plugin, (a, 1.0))
    plugin.optimizer_step(opt_a, None, None)
    backward(plugin, (a, 2.0))  # no zero_grad: 1 + 2
    plugin.optimizer_step(opt_a, None, None)
    assert a.item() == -1.0 - 3.0


def test_one_clipped_but_not_stepped_keeps_its_own_flag() -> None:
    plugin, (a, opt_a), (b, opt_b) = make(), weight(), weight()
    plugin.register_optimizers(opt_a, opt_b)
    backward(plugin, (a, 1.0), (b, INF))
    plugin.clip_gradients(None, opt_a, max_norm=5.0)
    plugin.clip_gradients(None, opt_b, max_norm=5.0)
    step(plugin, opt_b)
    assert plugin.scale == 4.0  # read between the two steps: the update is due now
    step(plugin, opt_a)
    assert (a.item(), b.item(), plugin.scale) == (-1.0, 0.0, 4.0)


def test_the_update_waits_for_every_optimizer_of_the_run() -> None:
    plugin, (a, opt_a), (b, opt_b) = make(growth_interval=1), weight(), weight()
    plugin.register_optimizers(opt_a, opt_b)
    torch_scaler = plugin.setup_scaler()
    backward(plugin, (a, 1.0), (b, 1.0))
    step(plugin, opt_a)
    assert torch_scaler.get_scale() == 8.0
    step(plugin, opt_b)
    assert torch_scaler.get_scale() == 16.0
    backward(plugin, (a, 1.0))
    step(plugin, opt_a)
    assert torch_scaler.get_scale() == 16.0
    backward(plugin, (a, 1.0))  # the next scaling brings it
    assert torch_scaler.get_scale() == 32.0


def test_whole_model_clip_covers_both_optimizers() -> None:
    plugin, model = make(), nn.ParameterDict({"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1))})
    opt_a, opt_b = SGD([model["a"]], lr=1.0), SGD([model["b"]], lr=1.0)
    plugin.register_optimizers(opt_a, opt_b)
    backward(plugin, (model["a"], 3.0), (model["b"], 4.0))
    assert plugin.clip_gradients(model, None, max_norm=1.0) == 5.0
    step(plugin, opt_a)
    step(plugin, opt_b)
    assert model["a"].item() == pytest.approx(-0.6) and model["b"].item() == pytest.approx(-0.8)


def test_whole_model_clip_refuses_gradients_of_unknown_optimizers() -> None:
    plugin, model = make(), nn.Linear(1, 1)
    plugin.convert_module(model)
    backward(plugin, (model.weight, 1.0))
    with pytest.raises(ValueError, match=r"no known optimizer holds: weight\. Pass the optimizer"):
        plugin.clip_gradients(model, None, max_norm=1.0)


def test_an_optimizer_that_is_gone_is_forgotten() -> None:
    plugin, (a, opt_a), (_, opt_b) = make(growth_interval=1), weight(), weight()
    plugin.register_optimizers(opt_a, opt_b)
    del opt_b, _
    gc.collect()
    backward(plugin, (a, 1.0))
    step(plugin, opt_a)
    assert plugin.setup_scaler().get_scale() == 16.0  # nobody is waited for


def test_sparse_gradients() -> None:
    plugin, table = make(), nn.Embedding(4, 2, sparse=True)
    before, optimizer = table.weight.detach().clone(), SGD(table.parameters(), lr=1.0)
    plugin.backward(plugin.pre_backward(table(torch.tensor([1, 1, 3])).sum(), table), table)
    plugin.optimizer_step(optimizer, table, None)
    expected = before - torch.tensor([[0.0], [2.0], [0.0], [1.0]])  # of 2 torch may take 1 twice
    assert torch.allclose(table.weight.detach(), expected, rtol=0.0, atol=1e-6)
