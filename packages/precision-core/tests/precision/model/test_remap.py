"""Repointing: the optimizer made before trains the new parameters as one made afterwards does."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from precision_core.precision.model.remap import named_params, remap_parameters, replaced_params

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd-momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, foreach=False),
    "sgd-foreach": lambda params: SGD(params, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda params: Adam(params, lr=0.1, foreach=False),
    "adam-foreach": lambda params: Adam(params, lr=0.1, foreach=True),
    "adam-fused": lambda params: Adam(params, lr=0.1, fused=True),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def renew(module: nn.Module, *names: str) -> Any:
    """Gives `module` new parameter objects of the same values; returns old -> new."""
    before = named_params(module)
    for name in names or list(before):
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner)
        setattr(holder, key, nn.Parameter(getattr(holder, key).detach().clone()))
    return replaced_params(before, module)


def train(module: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module(torch.arange(6.0).view(2, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
    return [param.detach().clone() for param in module.parameters()]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("names", [(), ("0.weight",), ("2.bias", "0.bias")])
def test_trains_as_an_optimizer_made_afterwards(kind: str, names: tuple[str, ...]) -> None:
    module = model()
    optimizer = OPTIMIZERS[kind](list(module.parameters()))
    remap_parameters(optimizer, renew(module, *names))
    twin = copy.deepcopy(module)
    start = [param.detach().clone() for param in twin.parameters()]
    expected = train(twin, OPTIMIZERS[kind](list(twin.parameters())))
    trained = train(module, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(trained, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(trained, start, strict=True))


def test_groups_keep_their_lists_their_order_and_their_options() -> None:
    module = model()
    first, last = module[0], module[2]
    optimizer = SGD([{"params": [last.bias, first.weight], "lr": 0.5}, {"params": [last.weight, first.bias]}], lr=0.1)
    lists = [group["params"] for group in optimizer.param_groups]
    kept = first.bias
    remap_parameters(optimizer, renew(module, "0.weight", "2.weight", "2.bias"))
    assert [group["params"] for group in optimizer.param_groups] == [
        [last.bias, first.weight],
        [last.weight, kept],
    ]
    assert all(group["params"] is old for group, old in zip(optimizer.param_groups, lists, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_one_new_parameter_stands_once() -> None:
    a, b, c, new = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    optimizer = SGD([{"params": [("a", a), ("c", c)]}, {"params": [("b", b)]}], lr=0.1)
    remap_parameters(optimizer, {a: new, b: new})
    assert [group["params"] for group in optimizer.param_groups] == [[new, c], []]
    assert [group["param_names"] for group in optimizer.param_groups] == [["a", "c"], []]
    remap_parameters(optimizer, {c: new})  # it is held already
    assert [group["params"] for group in optimizer.param_groups] == [[new], []]


@pytest.mark.parametrize("named", [False, True])
def test_state_for_a_replaced_parameter_is_an_error_that_changes_nothing(named: bool) -> None:
    module = model()
    optimizer = Adam(list(module.named_parameters() if named else module.parameters()))
    train(module, optimizer)
    before = [param for group in optimizer.param_groups for param in group["params"]]
    with pytest.raises(ValueError, match="make the optimizer after setup, or convert the model first") as info:
        remap_parameters(optimizer, renew(module, "0.weight", "2.bias"))
    for shown in ("0.weight", "2.bias") if named else ("number 0 of", r"(4, 3)", "number 3 of", r"(2,)"):
        assert shown in str(info.value)
    assert "0.bias" not in str(info.value)
    after = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(a is b for a, b in zip(before, after, strict=True)) and len(optimizer.state) == 4


def test_an_empty_state_goes() -> None:
    old, new = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SGD([old], lr=0.1)
    optimizer.state[old] = {}
    remap_parameters(optimizer, {old: new})
    assert optimizer.param_groups[0]["params"] == [new] and len(optimizer.state) == 0


def test_an_optimizer_of_other_parameters_is_left_as_it_is() -> None:
    module, other = model(), nn.Linear(2, 2)
    optimizer = Adam(other.parameters())
    other(torch.ones(2)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    remap_parameters(optimizer, renew(module))
    assert [param for group in optimizer.param_groups for param in group["params"]] == [other.weight, other.bias]
    assert str(optimizer.state_dict()) == str(before)


def test_tied_parameters_are_mapped_under_all_their_names() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight  # type: ignore[assignment]
    before, old = named_params(module), module["a"].weight
    assert set(before) == {f"{key}.{name}" for key in "abc" for name in ("weight", "bias")}
    module["b"].weight = nn.Parameter(torch.zeros(2, 2))
    assert dict(replaced_params(before, module)) == {old: module["b"].weight}


def test_no_old_parameter_is_kept_alive() -> None:
    module = model()
    before, old = named_params(module), weakref.ref(module[0].weight)
    held = module[2].weight
    module[0], module[2] = nn.Linear(3, 4), nn.Linear(4, 2)
    assert old() is None
    params = replaced_params(before, module)
    assert dict(params) == {held: module[2].weight}
    del held
    assert len(params) == 0
