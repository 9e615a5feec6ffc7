"""fabric.load(trust=...): what a checkpoint names is executed only if the caller says so, in files and in folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core import CheckpointError, Fabric
from precision_core.checkpoint.storage import manifest as folder_manifest
from precision_core.checkpoint.storage.folder import STRUCTURE, write_folder

FABRIC = Fabric(accelerator="cpu")


class Hostile:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.made,)


def write_file(path: Path, hostile: Hostile) -> None:
    FABRIC.save(path, {"step": 1})
    torch.save({**torch.load(path, weights_only=True), "more": hostile}, path)


def write_structure(path: Path, hostile: Hostile) -> None:
    FABRIC.save(path.with_name("file"), {"step": 1})
    write_folder(path, torch.load(path.with_name("file"), weights_only=True))
    structure = torch.load(path / STRUCTURE, weights_only=True)
    torch.save({**structure, "more": hostile}, path / STRUCTURE)
    sign(path)


def sign(path: Path) -> None:
    """Writes the manifest anew, as whoever writes the folder can."""
    body = json.loads((path / "manifest.json").read_text())
    body.pop("crc")
    body["files"] = {name: folder_manifest.digest(path / name) for name in body["files"]}
    (path / "manifest.json").write_text(json.dumps({**body, "crc": folder_manifest._crc(body)}))


@pytest.mark.parametrize("write", [write_file, write_structure])
@pytest.mark.parametrize("into", [False, True])
def test_nothing_is_executed_without_trust(write: Any, into: bool, tmp_path: Path) -> None:
    state = {"step": 0} if into else None
    write(tmp_path / "x", Hostile(tmp_path / "made"))
    with pytest.raises(CheckpointError):
        FABRIC.load(tmp_path / "x", state)
    assert not (tmp_path / "made").exists() and state in (None, {"step": 0})
    assert FABRIC.load(tmp_path / "x", state, trust=True).get("step", 1) == 1
    assert (tmp_path / "made").exists()  # the pickle is one that does it
