"""Optimizer state follows its parameter by name, where both sides have names; else its place, if that can be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR, StepLR

from precision_core import CheckpointError, Fabric
from precision_core.checkpoint.error import RESERVED
from precision_core.checkpoint.storage.file import read, write
from precision_core.testing.ranks import run_in_ranks

Make = Callable[[nn.Module], Any]


def net(*shape: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(shape[0], shape[-1], bias=False) for _ in range(3)))


def plain(model: nn.Module) -> Any:
    return list(model.parameters())


def backwards(model: nn.Module) -> Any:
    return plain(model)[::-1]


def named(model: nn.Module) -> Any:
    return list(model.named_parameters())


def named_backwards(model: nn.Module) -> Any:
    return named(model)[::-1]


def two_groups(model: nn.Module) -> Any:
    first, second, third = plain(model)
    return [{"params": [first, second], "lr": 0.5}, {"params": [third], "lr": 0.25, "weight_decay": 0.125}]


def two_groups_backwards(model: nn.Module) -> Any:
    first, second = two_groups(model)
    return [{**second, "lr": 9.0}, {**first, "params": first["params"][::-1], "lr": 8.0}]


def two_named_groups(model: nn.Module) -> Any:
    first, second, third = named(model)
    return [{"params": [first, second], "lr": 0.5}, {"params": [third], "lr": 0.25, "weight_decay": 0.125}]


def two_named_groups_backwards(model: nn.Module) -> Any:
    return [{**group, "lr": 9.0} for group in two_named_groups(model)[::-1]]


def step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step(lambda: torch.ones(())) if isinstance(optimizer, LBFGS) else optimizer.step()


def of_params(optimizer: Optimizer, model: nn.Module) -> list[tuple[Tensor, float, float]]:
    """Returns the first moment, learning rate and decay of each parameter of the model."""
    found = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            found[param] = optimizer.state[param]["exp_avg"], group["lr"], group["weight_decay"]
    return [found[param] for param in model.parameters()]


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x[0], y[0]) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def saved(path: Path, make: Make, keys: str, fabric: Fabric | None = None) -> list[tuple[Tensor, float, float]]:
    fabric, model = fabric or Fabric(accelerator="cpu"), net(2)
    model, optimizer = fabric.setup(model, Adam(make(model)))
    step(optimizer)
    state = {"model": model, "optimizer": optimizer}
    fabric.save(path, {key: state[key] for key in keys.split()})
    return of_params(optimizer, model)


def loaded(path: Path, make: Make, keys: str, **options: Any) -> tuple[Any, list[str]]:
    fabric, model = Fabric(accelerator="cpu"), net(2)
    model, optimizer = fabric.setup(model, Adam(make(model)))
    state = {"model": model, "optimizer": optimizer}
    fabric.load(path, {key: state[key] for key in keys.split()}, **options)
    notes = [note for note in fabric.precision_plugin.report.notes if note.startswith("optimizer: state")]
    return of_params(optimizer, model), notes


# ---------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("before", "after", "keys"),
    [
        (plain, backwards, "model optimizer"),
        (backwards, plain, "model optimizer"),
        (named, backwards, "model optimizer"),
        (plain, named_backwards, "model optimizer"),
        (named, named_backwards, "model optimizer"),
        (named, named_backwards, "optimizer"),
        (named_backwards, named, "optimizer"),
        (two_groups, two_groups_backwards, "model optimizer"),
        (two_groups_backwards, two_groups, "model optimizer"),
        (two_named_groups, two_named_groups_backwards, "optimizer"),
    ],
)
def test_state_and_options_follow_the_name(before: Make, after: Make, keys: str, path: Path) -> None:
    wanted = saved(path, before, keys)
    found, notes = loaded(path, after, keys)
    assert equal(found, wanted) and not notes


def test_names_of_torch_stay_true(path: Path) -> None:
    fabric, model = Fabric(accelerator="cpu"), net(2)
    optimizer = Adam(named(model))
    step(optimizer)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    for make, names in ((named_backwards, ["2.weight", "1.weight", "0.weight"]), (backwards, None)):
        other = Adam(make(model))
        fabric.load(path, {"model": model, "optimizer": other})
        wanted = names or ["2.weight", "1.weight", "0.weight"]
        assert other.param_groups[0]["param_names"] == wanted and equal(
            of_params(other, model), of_params(optimizer, model)
        )


def test_one_side_by_its_model_and_the_other_by_torchs_names(path: Path) -> None:
    wanted = saved(path, plain, "model optimizer")
    found, notes = loaded(path, named_backwards, "optimizer")
    assert equal(found, wanted) and not notes


def test_two_models_whose_parameters_have_the_same_names(path: Path) -> None:
    fabric, a, b = Fabric(accelerator="cpu"), net(2), net(2)
    optimizer = Adam([*a.parameters(), *b.parameters()])
    step(optimizer)
    state = {"models": {"a": a, "b": b}, "optimizer": optimizer}
    fabric.save(path, state)
    other = Adam([*b.parameters(), *a.parameters()])
    fabric.load(path, {**state, "optimizer": other})
    assert all(
        torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
        for p in (*a.parameters(), *b.parameters())
    )


def test_tied_and_compiled_parameters_are_known_by_each_of_their_names(path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return model

    fabric, model = Fabric(accelerator="cpu"), tied()
    optimizer = Adam(model.parameters())
    step(optimizer)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    other_model = tied()
    other = Adam(list(other_model.parameters())[::-1])
    fabric.load(path, {"model": torch.compile(other_model, backend="eager"), "optimizer": other})
    for mine, theirs in zip(other_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(other.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"])


def test_dtypes_of_state_follow_too(path: Path) -> None:
    fabric = Fabric(accelerator="cpu")
    model = nn.ParameterDict({"narrow": torch.ones(2, dtype=torch.bfloat16), "wide": torch.ones(2)})
    optimizer = Adam(model.values())
    step(optimizer)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    other = Adam([model["wide"], model["narrow"]])
    fabric.load(path, {"model": model, "optimizer": other})
    for param in model.values():
        mine, theirs = (each.state[param]["exp_avg"] for each in (other, optimizer))
        assert mine.dtype is theirs.dtype is param.dtype and torch.equal(mine, theirs)


def schedule(kind: str, optimizer: Optimizer) -> LRScheduler:
    makers: dict[str, Callable[[], LRScheduler]] = {
        "step": lambda: StepLR(optimizer, 2),
        "lambda": lambda: LambdaLR(optimizer, [lambda epoch: 0.5**epoch] * 2),
        "cyclic": lambda: CyclicLR(optimizer, [0.1, 0.2], [0.3, 0.5], step_size_up=3, cycle_momentum=False),
        "plateau": lambda: ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.3, 0.01]),
        "sequential": lambda: SequentialLR(optimizer, [LinearLR(optimizer), StepLR(optimizer, 1)], [3]),
    }
    return makers[kind]()


@pytest.mark.parametrize("kind", ["step", "lambda", "cyclic", "plateau", "sequential"])
def test_schedulers_go_on_with_each_groups_learning_rate(kind: str, path: Path) -> None:
    def advance(scheduler: Any, times: int) -> None:
        for _ in range(times):
            scheduler.optimizer.step()
            scheduler.step(1.0) if kind == "plateau" else scheduler.step()

    fabric, model = Fabric(accelerator="cpu"), net(2)
    optimizer = Adam(two_groups(model))
    scheduler = schedule(kind, optimizer)
    advance(scheduler, 2)
    fabric.save(path, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    other = Adam(two_groups_backwards(model))
    theirs = schedule(kind, other)
    fabric.load(path, {"model": model, "optimizer": other, "scheduler": theirs})
    for each in (scheduler, theirs):
        advance(each, 3)
    assert [group["lr"] for group in other.param_groups[::-1]] == [group["lr"] for group in optimizer.param_groups]
    assert theirs.get_last_lr()[::-1] == scheduler.get_last_lr()


# ---------------------------------------------------------------- what cannot be told


@pytest.mark.parametrize(
    ("before", "saved_keys", "after", "loaded_keys", "said"),
    [
        (plain, "model optimizer", plain, "optimizer", "only the checkpoint has parameter names"),
        (named, "optimizer", backwards, "optimizer", "only the checkpoint has parameter names"),
        (plain, "optimizer", named, "optimizer", "the checkpoint has no parameter names"),
    ],
)
def test_names_on_one_side_and_shapes_alike(
    before: Make, saved_keys: str, after: Make, loaded_keys: str, said: str, path: Path
) -> None:
    saved(path, before, saved_keys)
    message = rf"optimizer: {said}, and 3 of them have the shape \(2, 2\): their state cannot be matched"
    with pytest.raises(CheckpointError, match=message):
        loaded(path, after, loaded_keys)
    _, notes = loaded(path, after, loaded_keys, strict=False)
    assert notes == [f"optimizer: state was loaded by position, as {said}"]


def test_other_names_and_shapes_alike(path: Path) -> None:
    saved(path, named, "optimizer")
    with pytest.raises(CheckpointError, match="their names differ from those in the checkpoint, and 3 of them"):
        loaded(path, lambda model: [(f"net.{name}", param) for name, param in named(model)], "optimizer")


def test_shapes_that_differ_tell_positions_apart(path: Path) -> None:
    fabric, model = Fabric(accelerator="cpu"), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    optimizer = Adam(model.parameters())
    step(optimizer)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    other = Adam(model.parameters())
    fabric.load(path, {"optimizer": other})
    assert equal(of_params(other, model), of_params(optimizer, model))
    assert fabric.precision_plugin.report.notes[-1].endswith("by position, as only the checkpoint has parameter names")
    with pytest.raises(CheckpointError, match=r"exp_avg of parameter 0 has shape \(3, 2\) in the checkpoint, \(4,\)"):
        fabric.load(path, {"optimizer": Adam(list(model.parameters())[::-1])})


def test_names_on_no_side_go_by_position_with_a_note(path: Path) -> None:
    wanted = saved(path, plain, "optimizer")
    found, notes = loaded(path, plain, "optimizer")
    assert equal(found, wanted)
    assert notes == ["optimizer: state was loaded by position, as the parameters have no names"]


def test_a_checkpoint_of_an_older_release_goes_by_position_with_a_note(path: Path) -> None:
    wanted = saved(path, plain, "model optimizer")
    content = read(path)
    del content[RESERVED]["param_names"]
    write(path, content)
    found, notes = loaded(path, plain, "model optimizer")
    assert equal(found, wanted)
    by_position = "by position, as the checkpoint was written by a release that saved no names"
    assert notes == [f"optimizer: state was loaded {by_position}"]


def test_options_alone_are_state_too(path: Path) -> None:
    fabric, model = Fabric(accelerator="cpu"), net(2)

    def groups(*rates: float) -> SGD:
        return SGD([{"params": [param], "lr": rate} for param, rate in zip(model.parameters(), rates, strict=True)])

    fabric.save(path, {"model": model, "optimizer": groups(1.0, 2.0, 3.0)})
    with pytest.raises(CheckpointError, match="its groups 0 and 1 have 1 each and other options"):
        fabric.load(path, {"optimizer": groups(1.0, 2.0, 3.0)})
    fabric.save(path, {"model": model, "optimizer": groups(1.0, 1.0, 1.0)})
    fabric.load(path, {"optimizer": groups(1.0, 1.0, 1.0)})  # nothing that could land on another


def test_groups_of_other_parameters_are_named(path: Path) -> None:
    saved(path, two_groups, "model optimizer")

    def regrouped(model: nn.Module) -> Any:
        first, second, third = plain(model)
        return [{"params": [first, third]}, {"params": [second]}]

    with pytest.raises(
        CheckpointError, match=r"by name, its group 0 has parameters of the checkpoint's groups \[0, 1\]"
    ):
        loaded(path, regrouped, "model optimizer")


def test_one_state_for_all_parameters_keeps_their_order(path: Path) -> None:
    fabric, model = Fabric(accelerator="cpu"), net(2)
    optimizer = LBFGS(model.parameters(), max_iter=2)
    step(optimizer)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    fabric.load(path, {"model": model, "optimizer": LBFGS(model.parameters())})
    with pytest.raises(
        CheckpointError, match="in another order than in the checkpoint, and LBFGS has one state for all"
    ):
        fabric.load(path, {"model": model, "optimizer": LBFGS(backwards(model))})


def test_a_scheduler_that_nobody_knows_is_refused_with_groups_in_another_order(path: Path) -> None:
    class Own:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def state_dict(self) -> dict[str, Any]:
            return {"rates": [group["lr"] for group in self.optimizer.param_groups]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    fabric, model = Fabric(accelerator="cpu"), net(2)
    optimizer, other = Adam(two_groups(model)), Adam(two_groups_backwards(model))
    step(optimizer)
    fabric.save(path, {"model": model, "optimizer": optimizer, "scheduler": Own(optimizer)})
    with pytest.raises(
        CheckpointError, match=r"scheduler: the optimizer's groups are in another order .* a Own may keep"
    ):
        fabric.load(path, {"model": model, "optimizer": other, "scheduler": Own(other)})


# ---------------------------------------------------------------- several processes


def in_ranks(path: str) -> bool:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    torch.manual_seed(0)
    wanted = saved(Path(path), two_groups, "model optimizer", fabric)
    model = net(2)
    model, other = fabric.setup(model, Adam(two_groups_backwards(model)))
    fabric.load(path, {"model": model, "optimizer": other})
    fabric.teardown()
    return equal(of_params(other, model), wanted)


def test_under_ddp(path: Path) -> None:
    assert run_in_ranks(2, in_ranks, str(path)) == [True, True]
