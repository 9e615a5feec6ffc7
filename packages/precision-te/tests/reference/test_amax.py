"""Delayed scaling: the history and the scales, step by step, against the vendor's rules written as a list."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from precision_core import Fabric
from precision_core.strategies import DDPStrategy
from precision_core.testing import run_in_ranks
from precision_te import TransformerEnginePrecision
from precision_te.recipes import Delayed
from precision_te.reference import ReferenceLinear
from precision_te.reference.amax import AmaxState
from precision_te.reference.region import region


class Rules:
    """One tensor's history: the running value first, then the past, the oldest at index 1."""

    def __init__(self, steps: int, largest: float, algorithm: str, margin: int) -> None:
        self.history, self.scale = [0.0] * steps, 1.0
        self.largest, self.algorithm, self.margin = largest, algorithm, margin

    def step(self, *seen: float) -> None:
        self.history[0] = max(self.history[0], *seen)
        amax = max(self.history) if self.algorithm == "max" else self.history[0]
        if 0 < amax < math.inf:
            self.scale = self.largest / amax / 2**self.margin
        self.history = [*self.history[1:], self.history[0]] if len(self.history) > 1 else self.history
        self.history[0] = 0.0


def make_layer() -> ReferenceLinear:
    torch.manual_seed(0)
    return ReferenceLinear(nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.zeros(16)))


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("margin", [0, 1])
def test_history_and_scale_follow_the_rules(algorithm: str, steps: int, margin: int) -> None:
    recipe = Delayed(amax_history_len=steps, amax_compute_algo=algorithm, margin=margin)
    layer = make_layer()
    rules = [Rules(steps, largest, algorithm, margin) for largest in (448, 448, 57344)]
    for step, size in enumerate((3.0, 1.0, 0.5, 0.0, 7.0, 0.25, 0.125, 0.5)):
        x = torch.full((4, 16), size).requires_grad_()
        with torch.no_grad():
            layer.weight.mul_(1 + step)
        with region(recipe):
            y = layer(x)
        y.backward(torch.full_like(y, size / 8))
        for rule, seen in zip(rules, (size, layer.weight.abs().max().item(), size / 8), strict=True):
            rule.step(seen)
        assert layer.amax is not None
        assert torch.allclose(layer.amax.scale, torch.tensor([rule.scale for rule in rules]), rtol=1e-6)
        assert layer.amax.history.T.tolist() == [pytest.approx(rule.history) for rule in rules]


def test_a_step_is_quantised_with_the_scales_of_the_steps_before() -> None:
    recipe, layer = Delayed(amax_history_len=4), make_layer()
    x = torch.full((4, 16), 1000.0)
    with region(recipe):
        first = layer(x)
    clipped = torch.nn.functional.linear(x.clamp(max=448), layer.weight.clamp(-448, 448))
    assert (first - clipped).norm() < 0.07 * clipped.norm()  # the scale was 1
    with region(recipe):
        second = layer(x)
    exact = torch.nn.functional.linear(x, layer.weight)
    assert (second - exact).norm() < 0.07 * exact.norm()
    with region(recipe):
        third = layer(x * 2)  # twice what any step before had
    assert (third - exact).norm() < 0.07 * exact.norm()


def test_algorithms_of_ones_own() -> None:
    def smallest(history: Tensor) -> Tensor:
        assert history.shape == (2, 1)
        return history.amin(0) + 1

    def half(amax: Tensor, old: Tensor, largest: float, recipe: Delayed) -> Tensor:
        assert old.tolist() == [1] and recipe is mine
        return largest / amax / 2

    mine = Delayed(amax_history_len=2, amax_compute_algo=smallest, scaling_factor_compute_algo=half)
    state = AmaxState(2, torch.device("cpu"))
    state.record("input", torch.tensor([-3.0, 2.0]))
    state.update(mine, ("input", "weight", "grad"))
    assert state.scale.tolist() == [224, 224, 28672]
    assert state.history.tolist() == [[0, 0, 0], [3, 0, 0]]


def test_evaluation_is_noted_and_changes_no_scale() -> None:
    recipe, layer = Delayed(amax_history_len=2), make_layer()
    with region(recipe):
        layer(torch.full((2, 16), 2.0)).sum().backward()
    scale, history = layer.amax.scale.clone(), layer.amax.history.clone()
    with torch.no_grad(), region(recipe):
        outputs = [layer(torch.full((2, 16), 5.0)) for _ in range(2)]
    assert torch.equal(*outputs)
    assert torch.equal(layer.amax.scale, scale)
    assert torch.equal(layer.amax.history[1:], history[1:]) and layer.amax.history[0, 0] == 5
    with region(recipe):
        layer(torch.full((2, 16), 1.0))
    assert layer.amax.history[1, 0] == 5  # as with the vendor: the next step takes it over
    assert layer.amax.scale[0] == pytest.approx(448 / 5)


def test_an_infinity_keeps_the_scale_and_what_is_no_number_is_not_seen() -> None:
    recipe, state = Delayed(amax_history_len=2), AmaxState(2, torch.device("cpu"))
    for x, scale in (([4.0], 112), ([math.inf], 112), ([8.0], 112), ([8.0], 56), ([math.nan, 2.0], 56), ([0.0], 224)):
        state.record("input", torch.tensor(x))
        state.update(recipe, ("input",))
        assert state.scale[0] == scale
    state.record("input", torch.zeros(0, 4))
    assert state.history[0, 0] == 0


def test_a_history_of_another_length_is_cut_or_filled_up() -> None:
    state = AmaxState(3, torch.device("cpu"))
    state.history.copy_(torch.arange(9.0).view(3, 3))
    for steps, expected in ((5, [0, 0, 0, 3, 6]), (2, [0, 6]), (3, [0, 0, 6]), (1, [0])):  # the last is the newest
        state.resize(steps, torch.device("cpu"))
        assert state.history[:, 0].tolist() == expected
    layer = make_layer()
    for steps in (4, 2, 8):
        with region(Delayed(amax_history_len=steps)):
            layer(torch.ones(2, 16)).sum().backward()
        assert layer.amax.history.shape == (steps, 3)


def test_calibrating_collects_and_computes_as_torch() -> None:
    recipe, layer = Delayed(amax_history_len=2), make_layer()
    x = torch.randn(8, 16)
    with torch.no_grad(), region(recipe, calibrating=True):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.amax.scale[0] == pytest.approx((448 / x.abs().max()).item())
    assert layer.amax.scale[1] == pytest.approx((448 / layer.weight.abs().max()).item())


# ---------------------------------------------------------------- ranks


def train(
    rank: int, ranks: int, steps: int, reduce_amax: bool = True, freeze: bool = False
) -> tuple[list[float], list[Tensor], Any]:
    """Returns losses, the states and the gradients of this rank's share of each batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*(ReferenceLinear(each.weight, each.bias) for each in (nn.Linear(32, 32), nn.Linear(32, 32))))
    if freeze:
        model[0].requires_grad_(False)
    group = dist.group.WORLD if ranks > 1 else None
    run = DistributedDataParallel(model) if ranks > 1 else model
    recipe = Delayed(amax_history_len=4, reduce_amax=reduce_amax)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(16, 32, generator=generator) * torch.linspace(0.1, 4, 16).unsqueeze(1)
        x = batch.chunk(ranks)[rank]
        with region(recipe, group=group):
            y = run(x)
        loss = (y - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    states = [layer.amax.tensor() for layer in model]
    return losses, states, [param.grad for param in model.parameters()]


def _in_rank(reduce_amax: bool, freeze: bool) -> Any:
    dist.init_process_group("gloo")
    losses, states, _ = train(dist.get_rank(), 2, 8, reduce_amax, freeze)
    return losses, [state.tolist() for state in states]


@pytest.mark.parametrize("freeze", [False, True])
def test_two_ranks_have_one_history_and_the_loss_of_one_process(freeze: bool) -> None:
    (first, one), (second, two) = run_in_ranks(2, _in_rank, True, freeze)
    assert one == two
    alone, states, _ = train(0, 1, 8, freeze=freeze)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert mean == pytest.approx(alone, rel=1e-5)
    for mine, wanted in zip(one, states, strict=True):
        scales, history = torch.tensor(mine[0]), torch.tensor(mine[1:])
        factor = torch.tensor([1.0, 1.0, 2.0])  # the mean over half a batch has twice the gradient
        assert torch.allclose(history, wanted[1:] * factor, rtol=1e-5)
        assert torch.allclose(scales[:2], wanted[0, :2], rtol=1e-5)
        assert scales[2] == pytest.approx(wanted[0, 2].item() / (2 if history[:, 2].any() else 1), rel=1e-5)


class Branches(nn.Module):
    """Three layers of ones, of which a forward runs some."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        for layer in self.layers:
            nn.init.constant_(layer.weight, 1 / 16)

    def forward(self, x: Tensor, order: str) -> Tensor:
        for index in order:
            x = self.layers[int(index)](x)
        return x


def _branches(orders: tuple[str, str]) -> list[list[float]]:
    """Returns the largest values of input and gradient of each layer after a step."""
    plugin = TransformerEnginePrecision(
        "32-true", engine="reference", recipe={"recipe": "delayed", "amax_history_len": 2}
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(find_unused_parameters=True), precision=plugin)
    first, model, rank = Branches(), Branches(), fabric.global_rank
    fabric.setup(first)
    fabric.setup(model)
    with fabric.autocast():
        pass  # no layer ran, and all take part
    y = model(torch.full((2, 16), 1.0 + rank), orders[rank])
    with torch.no_grad():
        copy.deepcopy(model.layers[0])(torch.ones(1, 16))
    fabric.backward(y.sum() * (1 + rank))
    assert not any(layer.amax and layer.amax.history.any() for layer in first.layers)
    return [layer.amax.history[1, [0, 2]].tolist() if layer.amax else [0.0, 0.0] for layer in model.layers]


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        (("012", "210"), [[2, 2]] * 3),
        (("01", "02"), [[2, 2], [1, 1], [2, 2]]),
        (("0", "1"), [[1, 1], [2, 2], [0, 0]]),
        (("0", "012"), [[2, 2]] * 3),
    ],
)
def test_ranks_that_run_other_layers_do_not_mix_them(orders: tuple[str, str], expected: list[list[float]]) -> None:
    one, two = run_in_ranks(2, _branches, orders)
    assert one == two == [pytest.approx(row, rel=0.01) for row in expected]


def _copy_trains() -> str:
    plugin = TransformerEnginePrecision("32-true", engine="reference")
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision=plugin)
    model = nn.Sequential(nn.Linear(16, 16))
    fabric.setup(model)
    stranger = copy.deepcopy(model[0])
    with pytest.raises(RuntimeError, match=r"1 layers ran .* were not set up") as raised, fabric.autocast():
        stranger(torch.ones(1, 16))
    return str(raised.value)


def test_a_copy_that_trains_is_to_be_set_up() -> None:
    assert all("fabric.setup(copy)" in message for message in run_in_ranks(2, _copy_trains))


def test_without_reduction_each_rank_has_its_own() -> None:
    (_, one), (_, two) = run_in_ranks(2, _in_rank, False, False)
    assert one != two
