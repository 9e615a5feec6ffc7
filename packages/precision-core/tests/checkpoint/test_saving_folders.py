"""Fabric.save and load of strategies that shard: folders, written by all ranks, read by any number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import CheckpointError, Fabric, SingleDeviceStrategy
from precision_core.strategies import DDPStrategy
from precision_core.testing import run_in_ranks


class ShardedAlone(SingleDeviceStrategy):
    sharded = True


class Sharded(DDPStrategy):
    sharded = True


def trained(fabric: Fabric, seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        fabric.backward(model(torch.randn(2, 3)).pow(2).mean())
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "notes": (1, "two"), "steps": steps}


def figures(state: dict[str, Any]) -> list[float]:
    moments = [value for entry in state["optimizer"].state.values() for value in entry.values()]
    tensors = [*state["model"].parameters(), *moments]
    return [number for tensor in tensors for number in tensor.double().flatten().tolist()]


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", "bf16-true"])
def test_a_folder_of_one_process_goes_back_into_it_and_into_an_ordinary_one(mode: str, tmp_path: Path) -> None:
    fabric = Fabric(strategy=ShardedAlone("cpu"), precision=mode)
    state = trained(fabric, 0, 3)
    fabric.save(tmp_path / "folder", state)
    after = torch.rand(3)
    assert (tmp_path / "folder").is_dir()
    for strategy in (ShardedAlone("cpu"), SingleDeviceStrategy("cpu")):
        other = Fabric(strategy=strategy, precision=mode)
        mine = trained(other, 1, 1)
        assert other.load(tmp_path / "folder", mine) == {}
        assert torch.equal(torch.rand(3), after)  # the random generators too
        assert figures(mine) == figures(state) and mine["notes"] == (1, "two") and mine["steps"] == 3
        assert other.precision_plugin.state_dict() == fabric.precision_plugin.state_dict()
        assert other.load(tmp_path / "folder")["steps"] == 3


def write(path: Path) -> list[float]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=Sharded())
    state = trained(fabric, 0, 3)
    fabric.save(path, state)
    return figures(state)


def read(path: Path) -> tuple[list[float], list[float]]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=Sharded())
    state = trained(fabric, 1, 1)
    fabric.load(path, state)
    return figures(state), torch.rand(2).tolist()


def test_a_folder_of_two_ranks_is_read_by_two_and_by_one(tmp_path: Path) -> None:
    expected = run_in_ranks(2, write, tmp_path / "folder")[0]
    first, second = run_in_ranks(2, read, tmp_path / "folder")
    assert first[0] == second[0] == expected
    fabric = Fabric(accelerator="cpu")
    state = trained(fabric, 1, 1)
    fabric.load(tmp_path / "folder", state)
    assert figures(state) == expected


def test_a_torn_folder_changes_nothing(tmp_path: Path) -> None:
    fabric = Fabric(strategy=ShardedAlone("cpu"))
    fabric.save(tmp_path / "folder", trained(fabric, 0, 3))
    next((tmp_path / "folder").glob("*.distcp")).write_bytes(b"torn")
    state = trained(fabric, 1, 1)
    before = figures(state)
    with pytest.raises(CheckpointError):
        fabric.load(tmp_path / "folder", state)
    assert figures(state) == before and state["steps"] == 1


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for content in ([], ["notes.txt"]):
        for name in content:
            (tmp_path / "folder" / name).write_text("mine")
        with pytest.raises(CheckpointError):
            Fabric(accelerator="cpu").load(tmp_path / "folder")
