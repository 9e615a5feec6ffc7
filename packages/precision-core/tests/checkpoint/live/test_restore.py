"""Loading is all or nothing: whatever raises, and wherever, every live object has the values from before."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from precision_core import CheckpointError, Fabric, MixedPrecision
from precision_core.checkpoint.error import RESERVED


class Average:
    """An exponential average with a state of its own, that keeps what it is given and changes its history in place."""

    def __init__(self) -> None:
        self.average = torch.randn(3)
        self.history = [1.0, [2.0]]
        self.wrong: BaseException | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]
        self.history[:] = state["history"]
        self.seen = True
        torch.rand(1)
        if self.wrong is not None:
            raise self.wrong


class Layer(nn.Linear):
    """A layer that counts, and has a way of its own to load."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.count = 5
        self.wrong: BaseException | None = None

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.wrong is not None:
            raise self.wrong


class Run:
    def __init__(self, seed: int) -> None:
        Fabric.seed_everything(seed)
        plugin = MixedPrecision("16-mixed", "cpu", {"init_scale": 8.0 + seed * 8.0, "growth_interval": 2})
        self.fabric = Fabric(accelerator="cpu", precision=plugin)
        self.plain = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        self.own = nn.Sequential(nn.Linear(3, 3), Layer())
        self.adam = AdamW(self.plain.parameters(), lr=0.1 + seed)
        self.sgd = SGD(self.own.parameters(), lr=0.1 + seed, momentum=0.9)
        self.scheduler = OneCycleLR(self.adam, 0.1 + seed, total_steps=20)
        self.average = Average()
        self.loader = self.fabric.setup_dataloaders([torch.randn(2, 3) for _ in range(4)])
        self.fabric.setup(self.plain, self.adam)
        self.fabric.setup(self.own, self.sgd)
        self.state: dict[str, Any] = {
            "nested": {"plain": self.plain, "adam": self.adam},
            "own": self.own,
            "sgd": self.sgd,
            "scheduler": self.scheduler,
            "average": self.average,
            "loader": self.loader,
            "step": seed,
            "log": {"loss": [float(seed)]},
        }

    def train(self) -> None:
        for batch in self.loader:
            for optimizer in (self.adam, self.sgd):
                optimizer.zero_grad()
            self.fabric.backward(self.own(self.plain(batch)).pow(2).mean())
            self.adam.step()
            self.sgd.step()
            self.scheduler.step()

    def snapshot(self) -> dict[str, Any]:
        """Everything there is, in copies."""
        objects = (self.plain, self.own, self.adam, self.sgd, self.scheduler, self.average, self.loader)
        states = [each.state_dict() for each in objects] + [self.fabric.precision_plugin.state_dict()]
        streams = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]
        attributes = [sorted(vars(each)) for each in (self.average, self.scheduler, self.own[1])]
        plain = [self.state["step"], self.state["log"], repr(self.fabric.precision_plugin.report)]
        return copy.deepcopy({"states": states, "streams": streams, "attributes": attributes, "plain": plain})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    run = Run(1)
    run.train()
    run.fabric.save(tmp_path / "last.ckpt", run.state)
    return tmp_path / "last.ckpt"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def average(run: Run, path: Path, wrong: BaseException) -> str:
    run.average.wrong = wrong
    return "average"


def module(run: Run, path: Path, wrong: BaseException) -> str:
    run.own[1].wrong = wrong  # type: ignore[assignment, union-attr]
    return "own"


def module_post_hook(run: Run, path: Path, wrong: BaseException) -> str:
    run.plain[0].register_load_state_dict_post_hook(lambda *_: throw(wrong))
    return "nested.plain"


def module_pre_hook(run: Run, path: Path, wrong: BaseException) -> str:
    run.plain[0].register_load_state_dict_pre_hook(lambda *_: throw(wrong))
    return "nested.plain"


def optimizer_post_hook(run: Run, path: Path, wrong: BaseException) -> str:
    run.sgd.register_load_state_dict_post_hook(lambda *_: throw(wrong))
    return "sgd"


def optimizer_pre_hook(run: Run, path: Path, wrong: BaseException) -> str:
    run.sgd.register_load_state_dict_pre_hook(lambda *_: throw(wrong))
    return "sgd"


def optimizer_of_its_own(run: Run, path: Path, wrong: BaseException) -> str:
    load = run.adam.load_state_dict

    def fails(state: dict[str, Any]) -> None:
        load(state)
        run.adam.load_state_dict = load  # type: ignore[method-assign]
        throw(wrong)

    run.adam.load_state_dict = fails  # type: ignore[assignment, method-assign]
    return "nested.adam"


def scheduler(run: Run, path: Path, wrong: BaseException) -> str:
    load = run.scheduler.load_state_dict

    def fails(state: dict[str, Any]) -> None:
        load(state)
        run.adam.param_groups[0]["lr"] = 77.0  # as schedulers do that write the rate at once
        throw(wrong)

    run.scheduler.load_state_dict = fails  # type: ignore[method-assign]
    return "scheduler"


def precision(run: Run, path: Path, wrong: BaseException) -> str:
    load = run.fabric.precision_plugin.load_state_dict
    calls: list[int] = []

    def fails(state: dict[str, Any]) -> None:
        load(state)
        calls.append(1)
        if len(calls) == 1:
            throw(wrong)

    run.fabric.precision_plugin.load_state_dict = fails  # type: ignore[method-assign]
    return "the precision"


def generators(run: Run, path: Path, wrong: BaseException) -> str:
    content = torch.load(path, weights_only=True)
    content[RESERVED]["rng"]["torch"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(content, path)
    return "the random generators"


def loader(run: Run, path: Path, wrong: BaseException) -> str:
    content = torch.load(path, weights_only=True)
    content["loader"] = {"no": "position"}
    torch.save(content, path)
    return "loader"


def throw(error: BaseException) -> None:
    raise error


SABOTAGE: list[Callable[[Run, Path, BaseException], str]] = [
    average,
    module,
    module_pre_hook,
    module_post_hook,
    optimizer_pre_hook,
    optimizer_post_hook,
    optimizer_of_its_own,
    scheduler,
    precision,
    generators,
    loader,
]


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("trained", [False, True])
def test_whoever_raises_everything_is_as_before_and_the_error_says_who(
    sabotage: Callable[[Run, Path, BaseException], str], trained: bool, path: Path
) -> None:
    run = Run(0)
    if trained:
        run.train()
    name = sabotage(run, path, RuntimeError("the reason"))
    before = run.snapshot()
    with pytest.raises(CheckpointError, match=f"{name} could not be loaded, nothing was changed") as error:
        run.fabric.load(path, run.state)
    assert same(run.snapshot(), before)
    assert "the reason" in str(error.value) or sabotage in (generators, loader)
    assert error.value.__cause__ is not None and str(path) in str(error.value)


@pytest.mark.parametrize("sabotage", SABOTAGE[:-2], ids=lambda function: function.__name__)
def test_an_interrupt_stays_one_and_changes_nothing(
    sabotage: Callable[[Run, Path, BaseException], str], path: Path
) -> None:
    run = Run(0)
    run.train()
    sabotage(run, path, KeyboardInterrupt())
    before = run.snapshot()
    with pytest.raises(KeyboardInterrupt):
        run.fabric.load(path, run.state)
    assert same(run.snapshot(), before)


def test_what_was_loaded_depends_on_the_file_no_more(path: Path) -> None:
    run = Run(1)
    run.sgd.state["of no parameter"] = {"tensor": torch.ones(3)}  # type: ignore[index]
    run.adam.register_load_state_dict_pre_hook(lambda optimizer, state: setattr(run.adam, "kept", state))
    run.fabric.save(path, run.state)
    loaded = run.fabric.load(path)
    rest = run.fabric.load(path, {key: value for key, value in run.state.items() if key != "log"})
    assert rest == {"log": {"loss": [1.0]}}
    rest = {**rest, **run.fabric.load(path, {"own": run.own})}
    kept = run.adam.kept["state"]  # type: ignore[attr-defined]
    before = copy.deepcopy((run.snapshot(), rest, loaded, kept))
    with open(path, "r+b") as file:  # mapped memory would change, and end the process where the file does
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(10)
    assert same((run.snapshot(), rest, loaded, kept), before)


def test_tensors_that_are_populated_are_written_in_place(path: Path) -> None:
    run = Run(0)
    run.train()
    state = run.adam.state[run.plain[0].weight]
    moment, weight = state["exp_avg"], run.plain[0].weight
    run.fabric.load(path, run.state)
    assert run.adam.state[run.plain[0].weight]["exp_avg"] is moment and run.plain[0].weight is weight


def test_plain_values_are_replaced_last(path: Path) -> None:
    run = Run(0)
    log = run.state["log"]
    assert run.fabric.load(path, run.state) == {}
    assert run.state["step"] == 1 and run.state["log"] is log and log == {"loss": [1.0]}


def test_a_layer_that_cannot_be_written_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu")
    fabric.save(tmp_path / "last.ckpt", {"first": nn.Linear(2, 2), "odd": nn.Linear(2, 2)})
    first, odd = nn.Linear(2, 2), nn.Linear(2, 2)
    odd.bias = nn.Parameter(torch.ones(1).expand(2))
    before = copy.deepcopy(first.state_dict())
    with pytest.raises(CheckpointError, match="odd could not be loaded, nothing was changed"):
        fabric.load(tmp_path / "last.ckpt", {"first": first, "odd": odd})
    assert same(first.state_dict(), before)


def test_a_scheduler_without_its_optimizer_is_loaded_alone(tmp_path: Path) -> None:
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    fabric = Fabric(accelerator="cpu")
    fabric.save(tmp_path / "last.ckpt", {"scheduler": scheduler})
    other = StepLR(SGD(nn.Linear(1, 1).parameters(), lr=1.0), 1)
    fabric.load(tmp_path / "last.ckpt", {"scheduler": other})
    assert other.last_epoch == 1 and other.get_last_lr() == [0.1]
