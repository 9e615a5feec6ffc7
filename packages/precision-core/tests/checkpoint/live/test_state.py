"""State: from live objects to plain values, and back in place."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam

from precision_core import CheckpointError
from precision_core.checkpoint.live.compare import check_matches
from precision_core.checkpoint.live.restore import restore
from precision_core.checkpoint.live.state import collect


def net(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    pairs = zip(sizes or (2, 3), sizes[1:] or (3,), strict=False)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairs))


def load(tree: dict[str, Any], content: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    check_matches(tree, content, strict=strict)
    return restore(tree, content, strict=strict)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_objects_are_restored_in_place_and_plain_values_replaced() -> None:
    model = net()
    optimizer = stepped(Adam(model.parameters(), lr=0.1))
    tree = {"model": model, "optimizer": optimizer, "step": 7, "tensor": torch.ones(2), "note": None}
    content = copy.deepcopy(collect(tree))
    other = net(seed=1)
    fresh = {"model": other, "optimizer": Adam(other.parameters()), "step": 0, "tensor": None, "note": "x"}
    before = dict(fresh)
    assert load(fresh, {**content, "more": 1}) == {"more": 1}
    assert fresh["model"] is before["model"] and fresh["optimizer"] is before["optimizer"] and equal(other, model)
    assert (fresh["step"], fresh["note"]) == (7, None) and torch.equal(fresh["tensor"], torch.ones(2))
    state = fresh["optimizer"].state_dict()
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(state["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_nested_dicts_of_modules() -> None:
    tree = {"gan": {"generator": net(), "critic": net(3, 1), "ratio": 5}}
    content = collect(tree)
    fresh: dict[str, Any] = {"gan": {"generator": net(seed=1), "ratio": 0}}
    rest = load(fresh, content)
    assert equal(fresh["gan"]["generator"], tree["gan"]["generator"]) and fresh["gan"]["ratio"] == 5
    assert list(rest) == ["gan"] and list(rest["gan"]) == ["critic"]  # what had no place is not lost
    assert torch.equal(rest["gan"]["critic"]["0.weight"], tree["gan"]["critic"][0].weight)


def test_a_dict_of_plain_values_becomes_what_was_saved_in_place() -> None:
    history: dict[str, Any] = {}
    assert load({"history": history}, {"history": {"loss": [1.0], "lr": {"first": 0.1}}}) == {}
    assert history == {"loss": [1.0], "lr": {"first": 0.1}}


def test_a_key_that_is_missing_is_an_error_only_when_strict() -> None:
    tree = {"model": net(seed=1), "a": {"b": 1}}
    content = {"model": collect({"model": net()})["model"], "a": {}}
    with pytest.raises(CheckpointError, match=r"a\.b: missing in the checkpoint, which has \[\]"):
        load(tree, content)
    assert load(tree, content, strict=False) == {} and tree["a"] == {"b": 1} and equal(tree["model"], net())


@pytest.mark.parametrize("saved", ["plain", "compiled", "compiled inside"])
@pytest.mark.parametrize("live", ["plain", "compiled", "compiled inside"])
def test_compiled_and_plain_models_interchange(saved: str, live: str) -> None:
    def make(kind: str, seed: int) -> Any:
        model = net(2, 3, 1, seed=seed)
        if kind == "compiled inside":
            model[1] = torch.compile(model[1], backend="eager")  # type: ignore[assignment]
        return torch.compile(model, backend="eager") if kind == "compiled" else model

    content = collect({"model": make(saved, 0)})
    assert list(content["model"]) and not any("_orig_mod" in key for key in content["model"])
    model = make(live, 1)
    load({"model": model}, content)
    assert equal(model, net(2, 3, 1))


class Versioned(nn.Linear):
    """Halved its weights in version 2, and migrates older checkpoints by their version as torch's own layers do."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] / 2
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


@pytest.mark.parametrize("wrap_saved", [False, True])
@pytest.mark.parametrize("wrap_live", [False, True])
def test_the_versions_of_layers_are_kept(wrap_saved: bool, wrap_live: bool) -> None:
    def wrap(model: Any, wanted: bool) -> Any:
        return torch.compile(model, backend="eager") if wanted else model

    model, other = nn.Sequential(Versioned(2, 2)), nn.Sequential(Versioned(2, 2))
    load({"m": wrap(other, wrap_live)}, collect({"m": wrap(model, wrap_saved)}))
    assert equal(other, model)
    old = collect({"m": model})
    old["m"]._metadata["0"]["version"] = 1
    load({"m": wrap(other, wrap_live)}, old)
    assert torch.equal(other[0].weight, model[0].weight / 2)  # type: ignore[operator]


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Parameter(torch.zeros(1))

    def rename(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[prefix + "new"] = state_dict.pop(prefix + "old").reshape(1)


class RenamedByHook(Renamed):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(Renamed.rename)


class RenamedByMethod(Renamed):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize("layer", [RenamedByHook, RenamedByMethod])
def test_layers_that_load_their_own_way_may_rename(layer: type[Renamed]) -> None:
    model = nn.Sequential(net(), layer())
    saved = {"m": OrderedDict([*nn.Sequential(net(seed=1)).state_dict().items(), ("1.old", torch.tensor(4.0))])}
    load({"m": model}, saved)
    assert model[1].new.item() == 4.0 and equal(model[0], net(seed=1))  # type: ignore[union-attr, operator]
    saved["m"]["0.0.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"m\.0\.0\.weight: shape \(1,\)"):  # the others are compared still
        load({"m": model}, saved)


def test_lazy_layers_and_extra_state() -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> int:
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    model, fresh = (nn.Sequential(nn.LazyLinear(2), Counting(2, 2)) for _ in range(2))
    model(torch.ones(1, 3))
    model[1].count = 5
    load({"m": fresh}, collect({"m": model}))
    assert fresh[1].count == 5 and torch.equal(fresh[0].weight, model[0].weight)


def test_an_object_of_the_users_own_is_asked_for_its_state() -> None:
    class Average:
        value = 1.0

        def state_dict(self) -> dict[str, float]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.value = state["value"]

    average = Average()
    load({"average": average}, {"average": {"value": 4.0}})
    assert average.value == 4.0 and collect({"a": average}) == {"a": {"value": 4.0}}
    assert collect({"a": Average}) == {"a": Average}  # a class has no state; writing it is refused by its key


def test_a_dict_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {"a": {}}
    loop["a"]["back"] = loop
    with pytest.raises(ValueError, match=r"cannot save \['a'\]\['back'\]: it contains itself"):
        collect(loop)
    twice = {"x": 1}
    assert collect({"a": twice, "b": twice}) == {"a": {"x": 1}, "b": {"x": 1}}
