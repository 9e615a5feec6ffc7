"""Checkpoints of an engine: what core promises of a checkpoint, kept for folders that DeepSpeed writes."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.checkpoint import CheckpointError
from precision_core.testing import Net, loss_of, make_batch, run_in_ranks
from precision_deepspeed import DeepSpeedStrategy, consolidated_state_dict


def make(stage: int, mode: str, seed: int = 0, **options: Any) -> tuple[Fabric, Net, torch.optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage, **options), precision=mode)
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    return fabric, model, optimizer


def train(fabric: Fabric, model: Net, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        batch, target = make_batch(step * fabric.world_size + fabric.global_rank)
        loss = loss_of(model(batch), target)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def masters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the float32 values that the optimizer holds, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(param).detach().float().clone()
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def written(folder: Path, stage: int, mode: str) -> dict[str, torch.Tensor]:
    """Trains, saves twice, and returns the values of rank zero."""
    fabric, model, optimizer = make(stage, mode)
    state = {"model": model, "optimizer": optimizer, "progress": {"step": 3, "name": "first"}}
    for _ in range(2):  # the second one takes the first one's place
        train(fabric, model, optimizer, range(3))
        fabric.save(folder / "last", state)
    if stage > 0:
        return masters(model)
    if mode == "bf16-true":
        names = [name for name, param in model.named_parameters() if param.requires_grad]
        pairs = zip(names, optimizer.param_groups[0]["params"], strict=True)
        return {name: master.detach().clone() for name, master in pairs}
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.filterwarnings("ignore:.*casts buffers to")
@pytest.mark.parametrize("mode", ["16-mixed", "bf16-true"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_export_loads_on_one_device(tmp_path: Path, stage: int, mode: str) -> None:
    values = run_in_ranks(2, written, tmp_path, stage, mode)[0]
    assert os.listdir(tmp_path) == ["last"]  # nothing is left beside it
    exported = consolidated_state_dict(tmp_path / "last")
    model = Net(seed=1)
    model.load_state_dict(exported)
    Fabric(accelerator="cpu", precision="bf16-mixed").setup(model, torch.optim.SGD(model.parameters()))
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert trained.keys() == values.keys()
    for name, param in trained.items():
        assert exported[name].dtype is torch.float32
        assert torch.equal(param, values[name]), name


def resumed(folder: Path, stage: int) -> None:
    fabric, model, optimizer = make(stage, "16-mixed", seed=1)
    train(fabric, model, optimizer, range(2))
    inner: dict[str, Any] = {"step": 0}
    state = {"all": {"model": model, "optimizer": optimizer}, "progress": inner}
    with pytest.raises(CheckpointError, match="model"):  # it stands elsewhere in the file
        fabric.load(folder / "last", {**state, "all": {"model": optimizer}})
    rest = fabric.load(folder / "last", {"model": model, "optimizer": optimizer, "progress": inner})
    assert inner["step"] == 3 and inner["name"] == "first" and rest == {}
    assert fabric.precision_plugin.steps == 6


def refused(folder: Path, stage: int, words: str) -> None:
    fabric, model, optimizer = make(stage, "16-mixed", seed=1)
    state = {"model": model, "optimizer": optimizer, "progress": {"step": 0}}
    before = {name: value.clone() for name, value in masters(model).items()}
    with pytest.raises(CheckpointError, match=words):
        fabric.load(folder / "last", state)
    assert state["progress"] == {"step": 0} and fabric.precision_plugin.steps == 0
    after = masters(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_does_not_fit_or_is_damaged_changes_nothing(tmp_path: Path) -> None:
    run_in_ranks(2, written, tmp_path, 2, "16-mixed")
    run_in_ranks(2, resumed, tmp_path, 2)
    folder = tmp_path / "last"
    shard = next(folder.glob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run_in_ranks(2, refused, tmp_path, 2, "does not match its checksum")
    with pytest.raises(CheckpointError, match="checksum"):
        consolidated_state_dict(folder)
    (folder / "manifest.json").unlink()
    run_in_ranks(2, refused, tmp_path, 2, "its save was not finished")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EVIL"],)


def test_pickles_are_scanned_before_deepspeed_opens_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from precision_core.checkpoint import manifest as folder_manifest

    run_in_ranks(1, written, tmp_path, 2, "16-mixed")
    folder = tmp_path / "last"
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    shard = next(folder.glob("*optim_states.pt"))
    with zipfile.ZipFile(shard) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(shard, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, pickle.dumps(Evil(), protocol=2) if name.endswith("data.pkl") else data)
    (folder / "manifest.json").unlink()
    files = {file.name: folder_manifest.digest(file) for file in folder.iterdir()}
    folder_manifest.write(folder, folder_manifest.Manifest("", 1, files))  # who changes a file can change its digest
    for stage in (2, 3):  # the second one is a conversion
        run_in_ranks(1, refused, tmp_path, stage, "was not opened")
    with pytest.raises(CheckpointError, match="was not opened"):
        consolidated_state_dict(folder)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(Exception):  # noqa: B017 - it is no checkpoint, once it was executed
        consolidated_state_dict(folder, trust=True)
    assert (tmp_path / "executed").exists()


def saving_is_refused(folder: Path) -> None:
    fabric, model, optimizer = make(2, "bf16-mixed")
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with pytest.raises(ValueError, match="together"):
        fabric.save(folder / "a", {"model": model})
    with pytest.raises(ValueError, match="saves all of it"):
        fabric.save(folder / "a", state, filter={"model": lambda name, value: True})
    with pytest.raises(CheckpointError, match="for a pattern"):
        fabric.save(folder / "run[1]", state)
    (folder / "file").write_text("mine")
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        fabric.save(folder / "file", state)
    with pytest.raises(ValueError, match="object"):
        fabric.save(folder / "a", {**state, "odd": object()})
    assert sorted(os.listdir(folder)) == ["file"] and (folder / "file").read_text() == "mine"
    fabric.save(folder / "plain.ckpt", {"step": 3})  # without the engine's objects it is core's file
    assert fabric.load(folder / "plain.ckpt")["step"] == 3
    log = {"log": nn.Linear(2, 1)}  # what is not the engine's may be chosen from
    fabric.save(folder / "chosen", {**state, **log}, filter={"log": lambda name, value: name == "bias"})
    assert list(fabric.load(folder / "chosen")["log"]) == ["bias"]
    fabric.save(folder / "a", state)
    batch, target = make_batch(0)
    fabric.backward(loss_of(model(batch), target))
    with pytest.raises(CheckpointError, match="step first"):
        fabric.load(folder / "a", state)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    run_in_ranks(1, saving_is_refused, tmp_path)


def module_files(folder: Path, stage: int, mode: str) -> list[dict[str, torch.Tensor]]:
    """Returns the values written, those after they were loaded elsewhere, and those after a step of nothing."""
    fabric, model, optimizer = make(stage, mode)
    train(fabric, model, optimizer, range(2))
    fabric.save_module(folder / f"{stage}.safetensors", model)
    values = []
    with fabric.strategy.gathered(model):
        values.append({name: param.detach().clone() for name, param in model.named_parameters()})
    fabric, model, optimizer = make(stage, mode, seed=1)
    fabric.load_module(folder / f"{stage}.safetensors", model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(2):
        with fabric.strategy.gathered(model):
            values.append({name: param.detach().clone() for name, param in model.named_parameters()})
        train(fabric, model, optimizer, range(1))
    return values


@pytest.mark.filterwarnings("ignore:.*casts buffers to")
@pytest.mark.parametrize(("stage", "mode"), [(0, "bf16-true"), (2, "bf16-true"), (3, "bf16-mixed")])
def test_module_files_are_whole_and_reach_the_master_weights(tmp_path: Path, stage: int, mode: str) -> None:
    for written_values, loaded, stepped in run_in_ranks(2, module_files, tmp_path, stage, mode):
        for name, value in written_values.items():
            assert value.numel() and torch.equal(value, loaded[name]) and torch.equal(value, stepped[name]), name
