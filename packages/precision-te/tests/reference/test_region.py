"""Regions: what is inside, what an end does, and who is not concerned."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from precision_te.recipes import Current, Delayed
from precision_te.reference import ReferenceLinear
from precision_te.reference.region import current, region

DELAYED = Delayed(amax_history_len=4)


def make() -> ReferenceLinear:
    torch.manual_seed(0)
    return ReferenceLinear(nn.Parameter(torch.randn(16, 16)), None)


def test_a_region_begins_and_ends_even_by_an_error() -> None:
    assert current() is None
    layer = make()
    with pytest.raises(KeyError), region(DELAYED):
        assert current().recipe is DELAYED
        layer(torch.ones(1, 16))
        raise KeyError
    assert current() is None
    assert layer.amax.scale.tolist() == [1, 1, 1] and layer.amax.history[0, 0] == 1  # seen, and no update


def test_one_inside_of_an_equal_one_is_a_part_of_it() -> None:
    layer = make()
    with region(DELAYED):
        outer = current()
        for size in (2.0, 4.0):
            with region(Delayed(amax_history_len=4)):
                assert current() is outer
                layer(torch.full((1, 16), size))
            assert layer.amax.scale[0] == 1
        assert current() is outer
    assert layer.amax.history[:, 0].tolist() == [0, 0, 0, 4] and layer.amax.scale[0] == 112


def test_another_recipe_inside_holds_there() -> None:
    one, two = make(), make()
    x = torch.randn(4, 16)
    with region(Current()):
        expected = two(x)
    with region(DELAYED):
        one(x)
        with region(Current()):
            assert torch.equal(two(x), expected)
        assert current().recipe is DELAYED
    assert one.amax is not None and two.amax is None


def test_each_backward_moves_the_gradients_history_once() -> None:
    layers = [make() for _ in range(3)]
    with region(DELAYED):
        x = torch.randn(4, 16)
        for layer in layers:
            x = layer(x)
    x.sum().backward(retain_graph=True)
    for layer in layers:
        assert (layer.amax.history[:, 2] > 0).sum() == 1 and layer.amax.history[0, 2] == 0
        assert layer.amax.scale[2] == pytest.approx((57344 / layer.amax.history[-1, 2]).item())
    x.sum().backward()
    assert all((layer.amax.history[:, 2] > 0).sum() == 2 for layer in layers)
    with region(DELAYED):
        first, second = (layers[0](torch.randn(4, 16)) for _ in range(2))
    (first.sum() + second.sum() * 3).backward()
    assert layers[0].amax.history[-1, 2] == 3


def test_gradients_by_autograd_grad_count_too() -> None:
    layer, x = make(), torch.randn(4, 16, requires_grad=True)
    with region(DELAYED):
        y = layer(x)
    torch.autograd.grad(y.sum(), x)
    assert layer.amax.history[-1, 2] == 1 and layer.weight.grad is None


def test_other_threads_are_not_concerned() -> None:
    seen = []
    with region(DELAYED):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_backward_after_one_that_failed_moves_the_history_on(checkpointed: bool) -> None:
    first, layer = make(), make()
    fails = [True]

    def fail(grad: torch.Tensor) -> None:
        if fails:
            raise KeyError(fails.pop())

    x = torch.randn(4, 16, requires_grad=True)
    with region(DELAYED):
        middle = checkpoint(first, x, use_reentrant=True) if checkpointed else first(x)
        middle.register_hook(fail)
        y = layer(middle)
    with pytest.raises(KeyError):
        y.sum().backward(retain_graph=True)
    assert layer.amax.history[:, 2].tolist() == [1, 0, 0, 0]  # seen, and no update
    for step in range(2):
        (y.sum() * (2 + step)).backward(retain_graph=True)
        assert layer.amax.history[-1, 2] == 2 + step and layer.amax.history[0, 2] == 0
        assert first.amax.history[0, 2] == 0 and (first.amax.history[:, 2] > 0).sum() == 1 + step
