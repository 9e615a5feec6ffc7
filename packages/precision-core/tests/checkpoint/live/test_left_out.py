"""Loading with `strict=False`: what was missing and unexpected is said, once an object, before anything changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from precision_core import CheckpointError, Fabric
from precision_core.testing.ranks import run_in_ranks

FABRIC = Fabric(accelerator="cpu")


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Renaming(nn.Linear):
    """A layer with a way of its own to load: what was called `w` is its weight."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}w" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}w")
        super()._load_from_state_dict(state, prefix, *args)


def linear(kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(2, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0), layer.bias.fill_(2.0)
    return layer


def load(path: Path, state: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        returned = FABRIC.load(path, state, strict=False, **options)
    assert all(each.category is UserWarning and each.filename == __file__ for each in caught)
    return returned, [str(each.message).partition("strict=False): ")[2] for each in caught]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def test_nothing_fits_and_that_comes_first(path: Path) -> None:
    FABRIC.save(path, {"model": Wrapped(linear()), "more": 3})
    model = nn.Linear(2, 1)
    before = model.weight.clone()
    returned, texts = load(path, {"model": model})
    assert returned == {"more": 3} and torch.equal(model.weight, before)
    assert texts == [
        "nothing in the checkpoint matches model (Linear), which stays as it is; missing in the checkpoint: weight, "
        "bias; unexpected in the checkpoint: inner.weight, inner.bias"
    ]


def test_one_warning_an_object_with_ten_names_of_each_kind(path: Path) -> None:
    def stack(*names: str) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in names})

    a, b = [f"a{index}" for index in range(12)], [f"b{index}" for index in range(11)]
    FABRIC.save(path, {"nested": {"one": stack("x", *a)}, "two": stack("x")})
    _, texts = load(path, {"nested": {"one": stack("x", *b)}, "two": stack("x")})
    missing, unexpected = (", ".join(f"{name}.weight" for name in names[:10]) for names in (b, a))
    assert texts == [
        f"the checkpoint matches nested.one (ModuleDict) in part; missing in the checkpoint: {missing} and 1 more; "
        f"unexpected in the checkpoint: {unexpected} and 2 more"
    ]


def test_objects_and_values_that_the_checkpoint_has_no_key_for(path: Path) -> None:
    FABRIC.save(path, {"net": linear()})
    model = linear()
    optimizer = SGD(model.parameters(), lr=0.1)
    returned, texts = load(path, {"model": model, "step": 4, "log": {"best": 1.0, "optimizer": optimizer}})
    assert list(returned) == ["net"]
    assert texts == [
        "nothing in the checkpoint matches model (Linear), which stays as it is: it has no 'model', but ['net']",
        "nothing in the checkpoint matches log.optimizer (SGD), which stays as it is: it has no 'optimizer', but []",
        "not in the checkpoint, kept as they are: step, log.best",
    ]


def test_nothing_is_said_where_all_is_loaded(path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    tied["b"].weight = tied["a"].weight
    FABRIC.save(path, {"model": tied, "own": linear(), "step": 1}, filter={"model": lambda name, _: name != "b.weight"})
    state = {"model": tied, "own": linear(Renaming), "step": 0}
    assert load(path, state) == ({}, [])  # a tied weight under one of its names is loaded


def test_layers_that_load_their_own_way_say_it_themselves(path: Path) -> None:
    saved = {"model": {"w": torch.full((1, 2), 5.0), "x": torch.ones(1)}}
    FABRIC.save(path, saved)
    model = linear(Renaming)
    _, texts = load(path, {"model": model})
    assert model.weight.tolist() == [[5.0, 5.0]]
    assert texts == [
        "the checkpoint matches model (Renaming) in part; missing in the checkpoint: bias; "
        "unexpected in the checkpoint: x"
    ]


@pytest.mark.parametrize("kind", [nn.Linear, Renaming])
def test_where_warnings_are_errors_everything_is_as_before(kind: type[nn.Linear], path: Path) -> None:
    FABRIC.save(path, {"model": {"weight": torch.zeros(1, 2)}, "step": 9})
    state = {"model": linear(kind), "step": 0}
    with pytest.raises(CheckpointError, match=r"nothing was changed: UserWarning: .*in part; missing.*: bias"):
        FABRIC.load(path, state, strict=False)
    assert state["step"] == 0 and state["model"].weight.tolist() == [[1.0, 1.0]]


def in_ranks(path: str) -> list[str]:
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    model = fabric.setup(linear())
    fabric.save(path, {"model": Wrapped(linear())})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric.load(path, {"model": model}, strict=False)
    fabric.teardown()
    return [str(each.message).split("model")[0] for each in caught if each.category is UserWarning]


def test_rank_zero_says_it_for_all(path: Path) -> None:
    said, other = run_in_ranks(2, in_ranks, str(path))
    assert said == [f"fabric.load({str(path)!r}, strict=False): nothing in the checkpoint matches "] and other == []
