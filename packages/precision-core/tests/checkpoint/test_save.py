"""Fabric.save and Fabric.load: what is chosen by a filter, and several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from precision_core import CheckpointError, Fabric
from precision_core.checkpoint.error import RESERVED
from precision_core.strategies import DDPStrategy
from precision_core.testing.ranks import run_in_ranks

FABRIC = Fabric(accelerator="cpu")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


# ---------------------------------------------------------------- filter


def is_first(name: str, value: Any) -> bool:
    assert isinstance(value, Tensor)
    return name.startswith("0.")


def test_a_filter_chooses_entries_of_its_key(path: Path) -> None:
    model = net()
    state = {"model": model, "nested": {"model": model, "other": model}, "step": 3, "log": {"loss": 1.0, "large": [0]}}
    FABRIC.save(
        path,
        state,
        filter={"model": is_first, "nested": {"other": is_first}, "log": lambda name, value: name == "loss"},
    )
    loaded = FABRIC.load(path)
    assert list(loaded["model"]) == list(loaded["nested"]["other"]) == ["0.weight", "0.bias"]
    assert len(loaded["nested"]["model"]) == 4 and loaded["log"] == {"loss": 1.0} and loaded["step"] == 3
    assert len(model.state_dict()) == 4 and state["log"] == {"loss": 1.0, "large": [0]}


def test_a_part_loads_into_its_part(path: Path) -> None:
    FABRIC.save(path, {"model": net()}, filter={"model": is_first})
    model, before = net(seed=1), net(seed=1)
    with pytest.raises(CheckpointError, match=r"model\.1\.weight: missing in the checkpoint"):
        FABRIC.load(path, {"model": model})
    FABRIC.load(path, {"model": model}, filter={"model": is_first})
    assert torch.equal(model[0].weight, net()[0].weight) and torch.equal(model[1].weight, before[1].weight)
    FABRIC.save(path, {"models": {"a": net()}})
    model = net(seed=1)
    FABRIC.load(path, {"models": {"a": model}}, filter={"models": {"a": is_first}})
    assert torch.equal(model[0].weight, net()[0].weight) and torch.equal(model[1].weight, before[1].weight)


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        (
            {"modle": is_first},
            r"filter\['modle'\]: the state has no such key; its keys are \['model', 'nested', 'step'\]",
        ),
        ({"model": "0"}, r"filter\['model'\]: expected callable\(name, value\) -> bool, got '0'"),
        ({"nested": {"x": is_first}}, r"filter\['nested.x'\]: the state has no such key"),
        ({"step": is_first}, r"filter\['step'\]: a int has no entries to choose from"),
    ],
)
def test_a_filter_that_fits_nothing_is_named(filter: dict[str, Any], message: str, path: Path) -> None:
    state = {"model": net(), "nested": {"model": net()}, "step": 3}
    with pytest.raises(ValueError, match=message):
        FABRIC.save(path, state, filter=filter)
    assert not path.exists()
    FABRIC.save(path, state)
    with pytest.raises(ValueError, match=message):
        FABRIC.load(path, state, filter=filter)


def test_only_of_modules_a_part_is_loaded(path: Path) -> None:
    state = {"optimizer": SGD(net().parameters(), lr=1.0)}
    FABRIC.save(path, state)
    with pytest.raises(ValueError, match=r"'optimizer'.*only modules can be loaded in part"):
        FABRIC.load(path, state, filter={"optimizer": is_first})


# ---------------------------------------------------------------- what is said of what does not fit


def test_the_message_says_who_wrote_it_and_the_first_ten_differences(path: Path) -> None:
    Fabric(accelerator="cpu", precision="64-true").save(path, {"model": nn.Sequential(*[nn.Linear(2, 2)] * 8)})
    with pytest.raises(CheckpointError) as error:
        FABRIC.load(path, {"model": nn.Sequential(*(nn.Linear(2, 3) for _ in range(8)))})
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path} (policy 64-true, torch {torch.__version__}) does not match:"
    assert lines[1] == "  model.0.weight: shape (2, 2) in the checkpoint, (3, 2) in the model" and len(lines) == 12
    assert lines[11] == "  ... and 6 more [checkpoint-mismatch]"


# ---------------------------------------------------------------- several processes


class Fails:
    """An object that fails on one rank only."""

    def __init__(self, rank: int, method: str) -> None:
        self.rank, self.method, self.value = rank, method, 1

    def state_dict(self) -> dict[str, int]:
        self._perhaps("state_dict")
        return {"value": 2}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]
        self._perhaps("load_state_dict")

    def _perhaps(self, method: str) -> None:
        if os.environ["RANK"] == str(self.rank) and method == self.method:
            raise RuntimeError("the reason")


def ranks() -> Fabric:
    return Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy())


def draw_and_resume(path: Path) -> bool:
    fabric = ranks()
    Fabric.seed_everything(10)
    loader = fabric.setup_dataloaders(DataLoader(torch.arange(40), 3, shuffle=True))  # type: ignore[arg-type]
    Fabric.seed_everything(10 + fabric.global_rank)  # each rank has streams of its own
    iterator = iter(loader)
    next(iterator)
    fabric.save(path, {"loader": loader, "rank": fabric.global_rank})
    expected = torch.cat([*iterator, *loader, torch.randn(3)])
    Fabric.seed_everything(3)
    loader = fabric.setup_dataloaders(DataLoader(torch.arange(40), 3, shuffle=True))  # type: ignore[arg-type]
    state = {"loader": loader, "rank": None}
    fabric.load(path, state)
    assert state["rank"] == 0 and len(torch.load(path, weights_only=True)[RESERVED]["ranks"]) == 2
    return torch.equal(torch.cat([*loader, *loader, torch.randn(3)]), expected)


def test_each_rank_goes_on_with_its_own_streams_and_data(path: Path) -> None:
    assert run_in_ranks(2, draw_and_resume, path) == [True, True]


def fail_to_load(path: Path, rank: int) -> tuple[str, int, bool]:
    fabric, model = ranks(), net(seed=1)
    broken = Fails(rank, "load_state_dict")
    fabric.save(path, {"model": net(), "broken": broken})
    with pytest.raises(CheckpointError) as error:
        fabric.load(path, {"model": model, "broken": broken})
    return str(error.value), broken.value, torch.equal(model[0].weight, net(seed=1)[0].weight)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_fails_on_one_rank_changes_nothing_on_any(rank: int, path: Path) -> None:
    messages, values, equal = zip(*run_in_ranks(2, fail_to_load, path, rank), strict=True)
    assert values == (1, 1) and equal == (True, True)
    assert "broken could not be loaded, nothing was changed: RuntimeError: the reason" in messages[rank]
    assert f"rank {rank} could not load the checkpoint" in messages[1 - rank]


def fail_to_save(path: Path, rank: int) -> str:
    fabric = ranks()
    fabric.save(path, {"step": 1})
    with pytest.raises((RuntimeError, CheckpointError)) as error:
        fabric.save(path, {"step": 2, "broken": Fails(rank, "state_dict")})
    assert fabric.load(path) == {"step": 1}
    with pytest.raises((OSError, CheckpointError)):
        fabric.save(path / "below", {"step": 1})
    return str(error.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_old_file(rank: int, path: Path) -> None:
    messages = run_in_ranks(2, fail_to_save, path, rank)
    assert messages[rank] == "the reason"
    assert messages[1 - rank] == f"rank {rank} could not save the checkpoint: RuntimeError: the reason"


def load_alone(path: Path) -> tuple[float, float]:
    fabric, model = ranks(), net(seed=1)
    Fabric.seed_everything(fabric.global_rank)
    fabric.load(path, {"model": model})
    drawn = torch.rand(()).item()
    assert torch.equal(model[0].weight, net()[0].weight)
    Fabric.seed_everything(fabric.global_rank)
    return drawn, torch.rand(()).item()


def test_more_ranks_than_the_checkpoint_has_keep_their_own_streams(path: Path) -> None:
    Fabric.seed_everything(7)
    FABRIC.save(path, {"model": net()})
    Fabric.seed_everything(0)  # net() seeds with it, too
    expected = torch.rand(()).item()
    first, second = run_in_ranks(2, load_alone, path)
    assert first[0] != second[0] == second[1] and expected == first[1]
