"""safetensors of a sharded model: one whole file, written by rank zero, and each rank takes its shards of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from precision_core import CheckpointError, Fabric
from precision_core.testing import run_in_ranks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight


def model(seed: int) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in module.state_dict().items()
    }


def saved_and_loaded(folder: Path, mode: str) -> None:
    fabric = Fabric(accelerator="cpu", strategy="fsdp", precision=mode)
    mine = fabric.setup(model(1))
    wanted, path = values(mine), folder / "model.safetensors"
    fabric.save_module(path, mine)
    saved = load_file(path)
    assert (
        "head.weight" not in saved and saved.keys() | {"head.weight"} == wanted.keys()
    )  # what is tied is written once
    assert all(torch.equal(value, wanted[name]) and value.dtype is wanted[name].dtype for name, value in saved.items())
    other = fabric.setup(model(2))
    fabric.load_module(path, other)
    assert all(torch.equal(value, wanted[name]) for name, value in values(other).items())
    assert other.head.weight is other.embedding.weight


@pytest.mark.parametrize("mode", ["64-true", "32-true", "bf16-mixed"])
def test_a_sharded_model_is_saved_whole_and_loaded_in_shards(mode: str, tmp_path: Path) -> None:
    run_in_ranks(2, saved_and_loaded, tmp_path, mode)


def refused(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    fabric.save_module(folder / "m.safetensors", fabric.setup(nn.Linear(4, 3)))
    other = fabric.setup(nn.Linear(4, 2))
    before = values(other)
    with pytest.raises(CheckpointError, match=r"weight: shape \(3, 4\) in the checkpoint, \(2, 4\) in the model"):
        fabric.load_module(folder / "m.safetensors", other)
    assert all(torch.equal(value, before[name]) for name, value in values(other).items())


def test_another_shape_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run_in_ranks(2, refused, tmp_path)


def damaged_on_one_rank(folder: Path) -> str:
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    model = fabric.setup(nn.Linear(4, 3))
    fabric.save_module(folder / "0.safetensors", model)
    if fabric.global_rank == 1:
        whole = (folder / "0.safetensors").read_bytes()
        (folder / "1.safetensors").write_bytes(whole[: len(whole) // 2])
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    with pytest.raises(CheckpointError) as error:
        fabric.load_module(folder / f"{fabric.global_rank}.safetensors", model)
    assert all(not value.any() for value in values(model).values())
    return str(error.value)


def test_a_file_that_is_damaged_for_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    mine, theirs = run_in_ranks(2, damaged_on_one_rank, tmp_path)
    assert mine.startswith("rank 1 could not load the checkpoint: CheckpointError: ") and "1.safetensors" in theirs


def cannot_write(folder: Path) -> str:
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    model = fabric.setup(nn.Linear(4, 3))
    (folder / "file").touch()
    with pytest.raises((OSError, CheckpointError)) as error:
        fabric.save_module(folder / "file" / "model.safetensors", model)
    return "CheckpointError" if isinstance(error.value, CheckpointError) else "OSError"


def test_what_rank_zero_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    assert run_in_ranks(2, cannot_write, tmp_path) == ["OSError", "CheckpointError"]
