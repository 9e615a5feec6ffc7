"""Checkpoints of FSDPStrategy: runs go on bit for bit in every mode, and values move between any numbers of ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from precision_core import MODES, Fabric
from precision_core.testing import run_in_ranks
from precision_fsdp import FSDPStrategy

STEPS = 4  # of 3 in an epoch: it stops in the middle of the second
Outcome = tuple[list[float], dict[str, Any]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(5), nn.Linear(5, 5), nn.Dropout(0.2)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear(self.norm(x))) * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(5, 5)
        self.out = nn.Linear(5, 5)
        self.out.weight = self.head.weight  # tied

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(self.head(x))


class Run:
    """Dropout, shuffling, accumulation and clipping, on this rank."""

    def __init__(self, ranks: int, mode: str, seed: int, **options: Any) -> None:
        Fabric.seed_everything(seed)
        strategy: Any = FSDPStrategy(**options) if ranks > 1 else "auto"
        self.fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, precision=mode)
        model = Net()
        self.model, self.optimizer = self.fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4))
        data = TensorDataset(torch.randn(24, 5, generator=torch.Generator().manual_seed(0)))
        self.loader = self.fabric.setup_dataloaders(DataLoader(data, batch_size=4, shuffle=True))
        self.state = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader, "done": 0}

    def train(self, until: int) -> list[float]:
        losses: list[float] = []
        while self.state["done"] < until:
            for (x,) in self.loader:
                losses.append(self.step(x))
                self.state["done"] += 1
                if self.state["done"] == until:
                    break
        return losses

    def step(self, x: Tensor) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for half, last in ((x[:2], False), (x[2:], True)):
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                loss = self.model(half).pow(2).mean() / 2
                self.fabric.backward(loss)
            total += loss.item()
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)
        self.optimizer.step()
        return total

    def values(self) -> dict[str, Any]:
        """Returns parameters, buffers, the optimizer's and the precision's state, whole, by name."""
        found = dict(self.model.state_dict())
        for index, entry in self.optimizer.state_dict()["state"].items():
            found.update({f"{index}.{name}": value for name, value in entry.items()})
        state = self.fabric.precision_plugin.state_dict()
        counts = {name: value for name, value in (*state.items(), *state["scaler"].items()) if type(value) is not dict}
        found.update({name: torch.tensor(value) for name, value in counts.items() if name != "mode"})
        return {name: full(value) if isinstance(value, DTensor) else value for name, value in found.items()}


def full(value: DTensor) -> torch.Tensor:
    """Returns all ranks' parts; gloo gathers no int16, which master rests are."""
    return value.to(torch.int32).full_tensor() if value.dtype is torch.int16 else value.full_tensor()


def whole(ranks: int, mode: str, options: dict[str, Any]) -> Outcome:
    run = Run(ranks, mode, 1, **options)
    return run.train(2 * STEPS), run.values()


def first(ranks: int, mode: str, options: dict[str, Any], path: Path, wait: bool = True) -> Outcome:
    run = Run(ranks, mode, 1, **options)
    losses, values = run.train(STEPS), {name: value.clone() for name, value in run.values().items()}
    save = run.fabric.save(path, run.state, wait=wait)
    if not wait:
        run.train(STEPS + 1)
        save.wait()
    return losses, values


def second(
    ranks: int, mode: str, options: dict[str, Any], path: Path, until: int = 2 * STEPS, loader: bool = True
) -> Outcome:
    run = Run(ranks, mode, 99, **options)
    run.train(1)
    if not loader:  # the position in an epoch of another length is refused
        del run.state["loader"]
    run.fabric.load(path, run.state)
    assert run.state["done"] == STEPS
    return run.train(until), run.values()


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype is value.dtype and torch.equal(mine[name], value) for name, value in theirs.items()
    )


FAST = {  # each kind, and each mode
    *(("sharded", mode) for mode in ("64-true", "16-true", "bf16-mixed")),
    *(("full", mode) for mode in ("32-true", "16-mixed")),
    *(("in the background", mode) for mode in ("bf16-true", "16-mixed")),
}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=() if (kind, mode) in FAST else pytest.mark.full)
        for kind in ("sharded", "full", "in the background")
        for mode in MODES
    ],
)
def test_resuming_in_new_processes_is_bit_exact(kind: str, mode: str, tmp_path: Path) -> None:
    options = {"state_dict_type": "full" if kind == "full" else "sharded"}
    expected = run_in_ranks(2, whole, 2, mode, options)
    assert expected[0][0] != expected[1][0] and same(expected[0][1], expected[1][1])
    halves = run_in_ranks(2, first, 2, mode, options, tmp_path / "half", kind != "in the background")
    assert (tmp_path / "half").is_file() == (kind == "full")
    rest = run_in_ranks(2, second, 2, mode, options, tmp_path / "half")
    for rank in range(2):
        assert halves[rank][0] + rest[rank][0] == expected[rank][0]
        assert same(rest[rank][1], expected[rank][1])


FAST_MOVES = {  # each pair of numbers, each kind with and without a scale
    (2, 3, "sharded", "16-mixed"),
    (3, 1, "sharded", "bf16-mixed"),
    (3, 1, "full", "16-mixed"),
    (1, 2, "full", "bf16-mixed"),
}


@pytest.mark.parametrize(
    ("before", "after", "kind", "mode"),
    [
        pytest.param(*case, marks=() if case in FAST_MOVES else pytest.mark.full)
        for case in (
            (before, after, kind, mode)
            for before, after in ((2, 3), (3, 1), (1, 2))
            for kind in ("sharded", "full")
            for mode in ("bf16-mixed", "16-mixed")
        )
    ],
)
def test_values_move_between_numbers_of_ranks(before: int, after: int, kind: str, mode: str, tmp_path: Path) -> None:
    options = {"state_dict_type": kind}
    expected = in_ranks(before, first, mode, options, tmp_path / "x")[0][1]
    assert ("scale" in expected) == (mode == "16-mixed")
    for losses, values in in_ranks(after, second, mode, options, tmp_path / "x", STEPS, False):
        assert losses == [] and same(values, expected)
    outcomes = in_ranks(after, second, mode, options, tmp_path / "x", 2 * STEPS, False)  # it trains on
    assert all(len(losses) == STEPS and same(values, outcomes[0][1]) for losses, values in outcomes)
    assert not same(outcomes[0][1], expected)


def in_ranks(count: int, function: Any, mode: str, options: dict[str, Any], *args: Any) -> list[Any]:
    if count == 1:
        return [function(1, mode, options, *args)]
    return run_in_ranks(count, function, count, mode, options, *args)


def test_replicas_of_shards(tmp_path: Path) -> None:
    """HSDP writes each shard once, and reads it into every replica."""
    expected = run_in_ranks(2, first, 2, "bf16-mixed", {"mesh": (2, 1)}, tmp_path / "x")[0][1]
    for options in ({"mesh": (2, 1)}, {}):
        for _, values in run_in_ranks(2, second, 2, "bf16-mixed", options, tmp_path / "x", STEPS):
            assert same(values, expected)


def save_packed_state(folder: Path, state_dict_type: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.optim import AdamW8bit
    strategy = FSDPStrategy(state_dict_type=state_dict_type)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    model = nn.Linear(128, 64)
    model, optimizer = fabric.setup(model, AdamW8bit(model.parameters()))
    optimizer.state[model.weight]["exp_avg"] = optimizer._new_buffer(model.weight, True)
    with pytest.raises(ValueError) as caught:
        fabric.save(folder / "checkpoint", {"model": model, "optimizer": optimizer})
    fabric.save(folder / "checkpoint", {"model": model})
    fabric.teardown()
    return str(caught.value)


@pytest.mark.parametrize("state_dict_type", ["sharded", "full"])
def test_shards_of_packed_optimizer_state_are_refused_when_they_are_saved(state_dict_type: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    for said in run_in_ranks(2, save_packed_state, tmp_path, state_dict_type):
        assert said.startswith("cannot save optimizer.state.0.exp_avg: shards of a OptimState8bit cannot be read again")


def moments_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, float]]:
    """Returns the whole first moment and the learning rate of each parameter."""
    rates = {param: group["lr"] for group in optimizer.param_groups for param in group["params"]}
    return {
        name: (optimizer.state[param]["exp_avg"].full_tensor(), rates[param])  # type: ignore[attr-defined]
        for name, param in model.named_parameters()
    }


def reordered(folder: Path, state_dict_type: str, has_state: bool) -> bool:
    """Loads AdamW's state into one with its groups and its parameters the other way round; true where it followed."""
    run = Run(2, "32-true", seed=1, state_dict_type=state_dict_type)
    first, second = list(run.model.blocks.parameters()), [*run.model.head.parameters(), run.model.out.bias]
    groups = [{"params": first, "lr": 0.5}, {"params": second, "lr": 0.25}]
    optimizer = run.fabric.setup_optimizers(torch.optim.AdamW(groups))
    run.fabric.backward(run.model(torch.randn(2, 5)).pow(2).mean())
    optimizer.step()
    wanted = moments_by_name(run.model, optimizer)
    run.fabric.save(folder / "checkpoint", {"model": run.model, "optimizer": optimizer})
    other = run.fabric.setup_optimizers(
        torch.optim.AdamW([{"params": second[::-1], "lr": 9.0}, {"params": first[::-1], "lr": 9.0}])
    )
    if has_state:
        other.step()
    run.fabric.load(folder / "checkpoint", {"model": run.model, "optimizer": other})
    found = moments_by_name(run.model, other)
    run.fabric.teardown()
    return all(torch.equal(found[name][0], wanted[name][0]) and found[name][1] == wanted[name][1] for name in wanted)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("state_dict_type", ["sharded", "full"])
def test_sharded_optimizer_state_follows_its_parameter_by_name(
    state_dict_type: str, has_state: bool, tmp_path: Path
) -> None:
    assert run_in_ranks(2, reordered, tmp_path, state_dict_type, has_state) == [True, True]
