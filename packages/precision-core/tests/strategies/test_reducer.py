"""Parameters that begin or end to train after setup under DDP: as in one process on the whole batch, by value."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import DDPStrategy, Fabric, MixedPrecision
from precision_core.strategies.reducer import _Snapshot
from precision_core.testing import run_in_ranks
from precision_core.testing.ranks import RankError

STEPS = 5


class Net(nn.Module):
    """Some layers, of which a forward leaves those out that `skipped` names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.skipped: set[str] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.named_children():
            x = x if name in self.skipped else layer(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def whole_batch(step: int, part: int) -> torch.Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + part), dtype=torch.float64)


def change(how: str, model: Net, optimizer: torch.optim.Optimizer, step: int, seed: int) -> None:
    """What the user does before forward in each step; `seed` differs over ranks."""
    if how == "unfrozen" and step == 2:
        model.body.requires_grad_(True)
    elif how == "all unfrozen" and step == 0:
        model.requires_grad_(True)
    elif how == "frozen" and step == 2:
        model.body.requires_grad_(False)
    elif how == "by turns":
        model.body.requires_grad_(step % 2 == 1)
        model.head.requires_grad_(step % 2 == 0)
    elif how in ("added", "replaced", "a parameter added", "a block around") and step == 2:
        torch.manual_seed(seed)
        dtype = model.head.weight.dtype
        if how == "added":
            model.adapter = nn.Linear(2, 2).to(dtype)
            new = list(model.adapter.parameters())
        elif how == "replaced":
            model.head = nn.Linear(4, 2).to(dtype)
            new = list(model.head.parameters())
        elif how == "a block around":
            model.body = nn.Sequential(model.body, nn.Linear(4, 4).to(dtype))
            new = list(model.body[1].parameters())
        else:
            model.head.register_parameter("scale", nn.Parameter(torch.randn(2).to(dtype)))
            model.head.register_forward_hook(lambda layer, _, y: y * layer.scale)
            new = [model.head.scale]
        optimizer.add_param_group({"params": new})


BEGINS_FROZEN = {"unfrozen": ("body",), "all unfrozen": ("body", "norm", "head")}


def begin(how: str) -> Net:
    model = net()
    for name in BEGINS_FROZEN.get(how, ()):
        getattr(model, name).requires_grad_(False)
    return model


def trained(how: str, mode: str, unused: bool, accumulate: int) -> list[float]:
    options: dict[str, Any] = {"find_unused_parameters": True} if unused else {}
    precision = MixedPrecision(mode, device="cpu", scaler={"init_scale": 256.0}) if mode == "16-mixed" else mode
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(**options), precision=precision)
    model = begin(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fabric.setup(model, optimizer)
    rank = fabric.global_rank
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            if part == 0:
                change(how, model, optimizer, step, seed=rank)
            with fabric.no_backward_sync(model, enabled=part < accumulate - 1):
                x = whole_batch(step, part)[2 * rank : 2 * rank + 2]
                x = x.to(torch.float64 if mode == "64-true" else torch.float32)
                fabric.backward(model(x).double().pow(2).mean() / accumulate)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    assert not fabric.last_step_skipped
    return [value for param in model.parameters() for value in param.double().flatten().tolist()]


def reference(how: str, accumulate: int) -> list[float]:
    model = begin(how).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            if part == 0:
                change(how, model, optimizer, step, seed=0)
            (model(whole_batch(step, part)).pow(2).mean() / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [value for param in model.parameters() for value in param.flatten().tolist()]


HOW = ["unfrozen", "all unfrozen", "frozen", "by turns", "added", "replaced", "a parameter added", "a block around"]


@pytest.mark.parametrize(
    ("how", "unused"),
    [
        *((how, False) for how in HOW),
        *((how, True) for how in ("unfrozen", "by turns", "replaced")),
        *(pytest.param(how, True, marks=pytest.mark.full) for how in ("all unfrozen", "frozen", "added")),
    ],
)
def test_what_begins_to_train_later_is_averaged(how: str, unused: bool) -> None:
    first, second = run_in_ranks(2, trained, how, "64-true", unused, 1)
    assert first == second
    expected = reference(how, 1)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "mode", "unused", "tolerance"),
    [
        ("unfrozen", "64-true", False, 1e-10),
        ("added", "64-true", True, 1e-10),
        ("unfrozen", "16-mixed", True, 1e-2),
        ("all unfrozen", "16-mixed", False, 1e-2),
        ("added", "bf16-mixed", False, 3e-2),
    ],
)
def test_so_it_is_in_an_accumulation(how: str, mode: str, unused: bool, tolerance: float) -> None:
    first, second = run_in_ranks(2, trained, how, mode, unused, 3)
    assert first == second
    expected = reference(how, 3)
    torch.testing.assert_close(torch.tensor(first), torch.tensor(expected), rtol=0, atol=tolerance)


def between(unused: bool) -> list[float]:
    strategy = DDPStrategy(find_unused_parameters=unused)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision="64-true")
    model = begin("unfrozen")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    x = whole_batch(0, 0)[2 * fabric.global_rank :][:2]
    first = model(x).pow(2).mean()
    model.body.requires_grad_(True)
    second = model(x).pow(2).mean()
    fabric.backward(first + second)
    return [value for param in model.parameters() for value in param.grad.flatten().tolist()]  # type: ignore[union-attr]


@pytest.mark.parametrize("unused", [False, True])
def test_an_engine_goes_while_a_graph_of_it_lives(unused: bool) -> None:
    first, second = run_in_ranks(2, between, unused)
    assert first == second


def one_rank_alone(how: str) -> str:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(), precision="32-true")
    model = begin("unfrozen")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric.setup(model, optimizer)
    if fabric.global_rank == 0 or how == "other layers":
        (model.body if fabric.global_rank == 0 else model.norm).requires_grad_(fabric.global_rank == 0)
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    return "stepped"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("other layers", "rank 0 and rank 1 train other parameters of this Net: body.bias, body.weight, norm.bias"),
        pytest.param("one alone", "requires_grad changed on rank 0 after fabric.setup, and not on another rank"),
    ],
)
def test_ranks_that_train_other_parameters_are_told(how: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_in_ranks(2, one_rank_alone, how)


def buffers() -> tuple[list[float], bool]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(broadcast_buffers=False), precision="64-true")
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 has another name for it
        fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        x = whole_batch(0, 0)[2 * fabric.global_rank :][:2]
        for _ in range(2):
            fabric.backward(model(x).pow(2).mean())
            model[0].requires_grad_(True)
    gathered = fabric.all_gather(model[1].running_mean)
    return model[0].weight.grad.flatten().tolist(), bool((gathered[0] != gathered[1]).any())


def test_statistics_of_each_rank_stay_its_own() -> None:
    (first, own), (second, _) = run_in_ranks(2, buffers)
    assert first == second and own


def test_a_snapshot_sees_every_change() -> None:
    model = net()
    snapshot = _Snapshot(model)
    assert snapshot.holds() and len(snapshot.trained) == 6
    for how in ("unfrozen", "frozen", "by turns", "added", "replaced", "a parameter added", "a block around"):
        model = begin(how)
        snapshot = _Snapshot(model)
        assert snapshot.holds()
        change(how, model, torch.optim.SGD(model.parameters()), 2, 0)
        assert not snapshot.holds(), how


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_snapshot_of_a_scripted_part_holds() -> None:
    model = nn.Sequential(torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4)), nn.Linear(4, 2))
    snapshot = _Snapshot(model)
    assert snapshot.holds() and len(snapshot.trained) == 4
    model[0].requires_grad_(False)
    assert not snapshot.holds()
