"""Checkpoint folders on one process: what goes in comes out, in place and anew, and a save is all or nothing."""

from __future__ import annotations

import collections
import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage import dcp as folder_dcp
from precision_core.checkpoint.storage import folder as folder_checkpoint
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.storage.folder import Folder, write_folder

HEADER = {"policy": "bf16-mixed", "version": 1}


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype is b.dtype and a.shape == b.shape and torch.equal(*(x.to_dense().cdouble() for x in (a, b)))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def content() -> dict[str, Any]:
    model, optimizer = trained()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "__precision__": HEADER}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "last"
    write_folder(path, content())
    return path


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "value",
    [
        [
            torch.tensor(1.5),
            torch.zeros(0, 3),
            torch.ones(2, dtype=torch.bfloat16),
            torch.tensor([True]),
            torch.arange(3),
        ],
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        (1, (torch.ones(2), [None, "x", 1.5]), b"y", torch.float16, torch.Size([1])),
        {0: torch.ones(1), "0": torch.zeros(1), ("a", 1): torch.ones(2), None: {1.5: True}},
        collections.OrderedDict(b=torch.ones(1), a=2),
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(6.0)[2:4],
    ],
    ids=str,
)
def test_what_goes_in_comes_out(value: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"value": value})
    assert same(Folder(tmp_path / "x").everything(), {"value": value})


def test_names_that_meet_when_joined_by_dots(tmp_path: Path) -> None:
    value = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), "a.b~": torch.full((1,), 2.0)}
    write_folder(tmp_path / "x", value)
    assert same(Folder(tmp_path / "x").everything(), value)


def test_a_training_state_comes_out_and_loads(path: Path) -> None:
    read = Folder(path).everything()
    saved = content()
    saved.pop("__precision__")
    assert same(read, saved) and read["model"]._metadata == content()["model"]._metadata
    model, optimizer = trained()
    model.load_state_dict(read["model"])
    optimizer.load_state_dict(read["optimizer"])
    assert optimizer.state_dict()["state"][0]["step"].item() == 1


def test_what_it_holds_without_reading_a_tensor(path: Path) -> None:
    held = Folder(path).content
    assert all(tensor.is_meta for tensor in held["model"].values())
    assert held["optimizer"]["param_groups"] == content()["optimizer"]["param_groups"]
    assert held["__precision__"] == HEADER


def test_a_part_is_read_and_the_rest_left(path: Path) -> None:
    folder = Folder(path)
    read = folder.fetch(folder.content["model"], leave=lambda key_path: key_path != ("0.bias",))
    assert torch.equal(read["0.bias"], content()["model"]["0.bias"])
    assert read["0.weight"].is_meta and read["0.weight"].shape == (4, 3)


def test_the_vendors_reader_reads_the_tensors(path: Path) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in content()["model"].items()}
    moment = torch.zeros(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": tensors, "optimizer.state.0.exp_avg": moment}, checkpoint_id=path, no_dist=True)
    assert same(tensors, dict(content()["model"]))
    assert torch.equal(moment, content()["optimizer"]["state"][0]["exp_avg"])


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"step": 3})
    assert Folder(tmp_path / "x").everything() == {"step": 3}


def test_a_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4 * 1024 * 3  # three pieces of those that it is read in
    (tmp_path / "file").write_bytes(data + b"end")
    assert folder_manifest.digest(tmp_path / "file") == (len(data) + 3, zlib.crc32(data + b"end"))


def test_the_manifest_says_what_is_there(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["policy"] == "bf16-mixed" and manifest["world_size"] == 1 and manifest["complete"] is True
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(os.listdir(path))
    for name, (size, crc) in manifest["files"].items():
        assert folder_manifest.digest(path / name) == (size, crc) and size == (path / name).stat().st_size


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    for value, message in (
        ({"x": [object()]}, r"cannot save \['x'\]\[0\]"),
        ({"x": torch.ones(1, device="meta")}, "cannot save x: it is on the meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            write_folder(tmp_path / "x", value)
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(ValueError, match="contains itself"):
        write_folder(tmp_path / "x", loop)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- all or nothing


def test_a_newer_save_replaces_an_older(path: Path) -> None:
    (path.parent / ".last.old").mkdir()  # of a save that was cut off at its very end
    write_folder(path, {"step": 4})
    assert Folder(path).everything() == {"step": 4} and os.listdir(path.parent) == ["last"]


@pytest.mark.parametrize(
    "name", ["folder_dcp.save", "torch.save", "folder_manifest.write", "folder_manifest.put_in_place"]
)
def test_a_save_that_fails_leaves_the_old_one(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"{folder_checkpoint.__name__}.{name}", fail)
    with pytest.raises(OSError, match="no space left"):
        write_folder(path, {"step": 4})
    monkeypatch.undo()
    assert Folder(path).everything()["step"] == 3 and os.listdir(path.parent) == ["last"]


def test_a_disk_error_inside_of_the_vendors_writer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(OSError, match=r"could not write .* rank 0: OSError: no space left"):
        write_folder(path, content())
    assert os.listdir(path.parent) == ["last"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_crash_between_the_two_renames_is_recovered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def crash(source: Path, target: Path) -> None:
        if target == path:
            os._exit(9)
        rename(source, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "rename", crash)
        try:
            write_folder(path, {"step": 4})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not path.exists()
    assert Folder(path).everything()["step"] == 3
    write_folder(path, {"step": 5})
    assert Folder(path).everything() == {"step": 5}
    assert not (path.parent / ".last.old").exists()


def test_what_is_no_checkpoint_is_not_replaced(path: Path) -> None:
    others = path.parent
    (others / "file").write_text("x")
    for target in (others, others / "file"):
        with pytest.raises(ValueError, match=r"it exists and is not a checkpoint folder"):
            write_folder(target, {"step": 4})
    assert Folder(path).everything()["step"] == 3
    (others / "empty").mkdir()
    write_folder(others / "empty", {"step": 4})
    assert Folder(others / "empty").everything() == {"step": 4}


def test_a_folder_replaced_while_it_is_read_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = folder_dcp.load

    def replace(*args: Any) -> None:
        load(*args)
        write_folder(path, {"step": 4})

    monkeypatch.setattr(folder_dcp, "load", replace)
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        Folder(path).everything()


def test_a_missing_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        Folder(tmp_path / "x")
    (tmp_path / "x").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        Folder(tmp_path / "x")
