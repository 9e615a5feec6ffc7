"""Checkpoint folders on several ranks: written by two, read by one, two and three; an error on one is one on all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from precision_core.checkpoint.agreement import gather, together
from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.shards import is_sharded
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.storage.folder import Folder, write_folder
from precision_core.checkpoint.tree import paths
from precision_core.testing.ranks import run_in_ranks

WEIGHT = torch.arange(35.0).reshape(5, 7)  # divides among no number of ranks
PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}


def in_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    return run_in_ranks(count, in_group, function, *args, timeout=120)


def in_group(function: Callable[..., Any], *args: Any) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return function(*args)


def sharded(value: float = 1.0) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {name: distribute_tensor(WEIGHT * value, mesh, places) for name, places in PLACEMENTS.items()}
    return {"model": model, "step": 3, "rngs": gather(dist.get_rank(), None), "plain": torch.ones(2) * value}


def save(path: Path, value: float = 1.0) -> list[str]:
    write_folder(path, sharded(value))
    return sorted(os.listdir(path))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_into(path: Path, into: dict[str, Any]) -> Any:
    """Returns what the folder holds, sharded as the tensors in `into` are; all ranks verify it together."""
    folder = Folder(path)
    with together(None):
        folder.verify(dist.get_rank(), dist.get_world_size())
    return folder.fetch(folder.content, dict(paths(into, is_sharded)))


def load_into(path: Path) -> bool:
    into = sharded(0.0)
    read = read_into(path, into)
    assert read["step"] == 3 and read["rngs"] == [0, 1]
    assert torch.equal(read["plain"], torch.ones(2))
    for name, tensor in into["model"].items():
        assert read["model"][name].placements == tensor.placements
    return all(torch.equal(full(tensor), WEIGHT) for tensor in read["model"].values())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last"
    [files, _] = in_ranks(2, save, path)
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "chunks.json", "manifest.json", "structure.pt"]
    return path


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_any_number_of_ranks_reads_what_two_wrote(count: int, path: Path) -> None:
    assert in_ranks(count, load_into, path) == [True] * count


def test_a_process_alone_reads_what_two_wrote(path: Path) -> None:
    read = Folder(path).everything()
    for tensor in read["model"].values():
        assert torch.equal(tensor, WEIGHT) and type(tensor) is Tensor
    assert read["rngs"] == [0, 1]


def test_ranks_replace_what_ranks_wrote(path: Path) -> None:
    in_ranks(3, save, path, 2.0)
    assert torch.equal(Folder(path).everything()["model"]["rows"], WEIGHT * 2)
    assert os.listdir(path.parent) == ["last"]


def save_on_a_grid(path: Path, shapes: list[tuple[int, ...]]) -> bool:
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = {}
    for shape in shapes:
        places = [Replicate(), *map(Shard, range(len(shape)))]
        for pair in itertools.product(places, places):
            tensors[f"{shape} {pair}"] = distribute_tensor(counted(shape), mesh, pair)
    write_folder(path, tensors)
    read = read_into(path, tensors)
    return all(torch.equal(read[name].to_local(), tensor.to_local()) for name, tensor in tensors.items())


def counted(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_shards_along_two_dimensions_of_a_mesh(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(5, 7), (1, 3), (3,), (0, 3), ()]
    assert in_ranks(4, save_on_a_grid, tmp_path / "x", shapes) == [True] * 4
    for tensor in Folder(tmp_path / "x").everything().values():
        assert torch.equal(tensor, counted(tensor.shape))


# ---------------------------------------------------------------- FSDP2


def fsdp(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def fsdp_save(path: Path) -> Any:
    model, optimizer = fsdp(0)
    write_folder(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]  # type: ignore[index]
    return model[0].weight.full_tensor(), moment.full_tensor()  # type: ignore[index, operator, union-attr]


def fsdp_load(path: Path) -> Any:
    model, optimizer = fsdp(1)
    read = read_into(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model.load_state_dict(read["model"])
    optimizer.load_state_dict(read["optimizer"])
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]  # type: ignore[index]
    return model[0].weight.full_tensor(), moment.full_tensor()  # type: ignore[index, operator, union-attr]


def test_a_model_and_optimizer_under_fsdp2_resume_on_another_number_of_ranks(tmp_path: Path) -> None:
    (weight, moment), _ = in_ranks(2, fsdp_save, tmp_path / "x")
    for loaded_weight, loaded_moment in in_ranks(3, fsdp_load, tmp_path / "x"):
        assert torch.equal(loaded_weight, weight) and torch.equal(loaded_moment, moment)


# ---------------------------------------------------------------- errors


def save_with_error(path: Path, kind: str) -> str:
    content = sharded(5.0)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            if kind == "value":
                content["step"] = object()
            elif kind == "tensors":
                content["model"]["other"] = torch.ones(1)
            elif kind == "disk":
                patch.setattr(dcp.FileSystemWriter, "write_data", fail)
            elif kind == "digest":
                patch.setattr(folder_manifest, "digest", fail)
        try:
            write_folder(path, content)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def fail(*_: Any) -> Any:
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("value", ("CheckpointError: rank 1 of 2 failed: ValueError: cannot save ['step']", "ValueError: cannot save")),
        ("tensors", ("CheckpointError: cannot save: ranks 0 and 1 have different tensors: model.other",) * 2),
        ("disk", ("OSError: could not write", "OSError: could not write")),
        ("digest", ("CheckpointError: rank 1 of 2 failed: OSError: no space left", "OSError: no space left")),
    ],
)
def test_an_error_on_one_rank_while_saving(kind: str, messages: tuple[str, str], path: Path) -> None:
    for said, expected in zip(in_ranks(2, save_with_error, path, kind), messages, strict=True):
        assert said.startswith(expected)
    assert torch.equal(Folder(path).everything()["model"]["rows"], WEIGHT) and os.listdir(path.parent) == ["last"]


def load_with_error(path: Path) -> str:
    try:
        read_into(path, sharded(0.0))
    except CheckpointError as error:
        return str(error)
    return ""


def test_damage_that_one_rank_finds_is_an_error_on_all(path: Path) -> None:
    for name in ("__0_0.distcp", "__1_0.distcp", "structure.pt"):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-9] + b"x" + data[-8:])
        assert all("does not match its checksum" in said for said in in_ranks(2, load_with_error, path))
        (path / name).write_bytes(data)
    assert in_ranks(2, load_with_error, path) == ["", ""]
