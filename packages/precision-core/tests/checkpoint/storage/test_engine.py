"""Engine checkpoints: a third party's folder, read by the plain strategy through the package that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.strategies import SingleDeviceStrategy

_SOURCE = """
import torch
from precision_core import Strategy

class Format:
    def read(self, folder, content, trust):
        weights = torch.load(folder / "engine.pt", weights_only=True)
        return {**content, "net": weights}, {("adam",): "call engine.convert(path)"}

class Mine(Strategy):
    checkpoint_format = Format()
"""


def written(path: Path, engine: str) -> nn.Module:
    """Writes a folder as engines do: core's file with records, files of their own, and a manifest."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    path.mkdir()
    records = {"net": {engine: "model"}, "adam": {engine: "optimizer"}, "epoch": 5}
    Fabric(accelerator="cpu").save(path / "state.ckpt", records)
    torch.save(model.state_dict(), path / "engine.pt")
    files = {file.name: folder_manifest.digest(file) for file in path.iterdir()}
    folder_manifest.write(path, folder_manifest.Manifest("", 1, files))
    return model


def test_weights_are_read_and_other_objects_refused(tmp_path: Path, install: Callable[..., None]) -> None:
    install("mine", "[precision.strategies]\nmine = mine_module:Mine\n", "mine_module", _SOURCE)
    right = written(tmp_path / "last", "mine")
    for path in (tmp_path / "last", tmp_path / "last" / "state.ckpt"):
        fabric = Fabric(accelerator="cpu")
        model = nn.Linear(3, 2)
        model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
        state: dict[str, Any] = {"net": model, "epoch": 0}
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=r"adam: call engine\.convert\(path\)"):
                fabric.load(path, {**state, "adam": optimizer}, strict=strict)
        assert not torch.equal(model.weight, right.weight) and state["epoch"] == 0
        rest = fabric.load(path, state)
        assert torch.equal(model.weight, right.weight) and torch.equal(model.bias, right.bias)
        assert state["epoch"] == 5 and set(rest) == {"adam"}
        assert torch.equal(fabric.load(path)["net"]["weight"], right.weight)


def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, install: Callable[..., None]) -> None:
    install("other", "[precision.strategies]\nother = no_such_module:S\n")
    written(tmp_path / "last", "xla")
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"written by the engine of xla.*pip install"):
        Fabric(accelerator="cpu").load(tmp_path / "last", {"net": model})


def test_an_engine_without_a_format_is_named(tmp_path: Path, install: Callable[..., None]) -> None:
    source = "from precision_core import Strategy\nclass Plain(Strategy): ..."
    install("plain", "[precision.strategies]\nplain = plain_module:Plain\n", "plain_module", source)
    written(tmp_path / "last", "plain")
    with pytest.raises(
        CheckpointError, match="written by the engine of plain, whose strategy has no checkpoint_format"
    ):
        Fabric(accelerator="cpu").load(tmp_path / "last")


class _OneValue:
    """A format that writes and reads one value of the state, whatever else is in it."""

    def takes(self, strategy: Any, state: dict[str, Any]) -> bool:
        return "mine" in state

    def save(self, strategy: Any, path: Path, state: dict[str, Any], filter: Any) -> None:
        path.mkdir()
        torch.save(state["mine"], path / "state.ckpt")

    def load(self, strategy: Any, path: Path, state: Any, strict: bool, filter: Any, trust: bool) -> dict[str, Any]:
        return {"mine": torch.load(path / "state.ckpt"), "strict": strict, "trust": trust}


class _Mine(SingleDeviceStrategy):
    checkpoint_format = _OneValue()  # type: ignore[assignment]


def test_a_strategys_format_takes_what_it_says_and_loads_its_folders(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", strategy=_Mine())
    assert fabric.save(tmp_path / "mine", {"mine": 3, "step": 1}).done
    assert fabric.load(tmp_path / "mine", strict=False) == {"mine": 3, "strict": False, "trust": False}
    fabric.save(tmp_path / "cores", {"step": 1})
    assert fabric.load(tmp_path / "cores") == {"step": 1}


def test_load_module_says_what_reads_a_checkpoint(tmp_path: Path) -> None:
    model = written(tmp_path / "last", "mine")
    fabric = Fabric(accelerator="cpu")
    fabric.save(tmp_path / "file.ckpt", {"model": model})
    for path in (tmp_path / "last", tmp_path / "file.ckpt"):
        with pytest.raises(CheckpointError, match=r"checkpoint of fabric\.save.*fabric\.load\("):
            fabric.load_module(path, model)
