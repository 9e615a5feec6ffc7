"""What users name files by: addresses are refused before anything is made, `~` and `file://` are paths."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.checkpoint.paths import local_path
from precision_core.checkpoint.storage.folder import write_folder
from precision_core.checkpoint.weights.files import load_module, save_module

FABRIC = Fabric(accelerator="cpu")
CALLS: dict[str, Callable[[Any], Any]] = {
    "fabric.save": lambda path: FABRIC.save(path, {"model": nn.Linear(1, 1)}),
    "fabric.load": lambda path: FABRIC.load(path, {"model": nn.Linear(1, 1)}),
    "fabric.save_module": lambda path: FABRIC.save_module(path, nn.Linear(1, 1)),
    "fabric.load_module": lambda path: FABRIC.load_module(path, nn.Linear(1, 1)),
    "save_module": lambda path: save_module(path, nn.Linear(1, 1)),
    "load_module": lambda path: load_module(path, nn.Linear(1, 1)),
    "write_folder": lambda path: write_folder(path, {"x": torch.ones(1)}),
}
ADDRESSES = [
    "s3://bucket/last.ckpt",
    "gs://bucket/runs/1/",
    "S3://bucket/last.ckpt",
    "abfss://c@account.dfs.core.windows.net/last.ckpt",
    "hdfs:///user/last.ckpt",
    "https://host/last.ckpt",
    "dbfs:/mnt/last.ckpt",
    "simplecache::s3://bucket/last.ckpt",
    "hf://user/model",
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path(address: str, kind: Callable[[str], Any], home: Path) -> None:
    with pytest.raises(ValueError, match=r":// addresses are not supported. Pass a local path"):
        local_path(kind(address), "f")
    assert not os.listdir()


@pytest.mark.parametrize("call", CALLS)
def test_every_call_refuses_an_address_by_its_name_and_makes_nothing(call: str, home: Path) -> None:
    for address in ("s3://bucket/last.ckpt", Path("s3://bucket/last.safetensors")):
        with pytest.raises(ValueError, match=rf"^{call}\('s3:/.*: s3:// addresses are not supported"):
            CALLS[call](address)
    assert not os.listdir()


def test_an_address_within_a_path_or_an_object_that_would_fetch_a_copy(home: Path) -> None:
    class Remote:
        def __str__(self) -> str:
            return "s3://bucket/last.ckpt"

        def __fspath__(self) -> str:
            pytest.fail("it downloads")

    for path in (Remote(), "runs/s3://bucket/last.ckpt"):
        with pytest.raises(ValueError, match=r": s3:// addresses are not supported"):
            FABRIC.save(path, {})
    assert not os.listdir()


def test_home_and_file_addresses_are_where_they_say(home: Path) -> None:
    FABRIC.save("~/a/last.ckpt", {"step": 1})
    FABRIC.save(Path("~") / "b.ckpt", {"step": 2})
    FABRIC.save((home / "with space%.ckpt").as_uri(), {"step": 3})
    FABRIC.save_module("~/m.safetensors", nn.Linear(1, 1))
    assert sorted(os.listdir(home)) == ["a", "b.ckpt", "m.safetensors", "with space%.ckpt"] and not os.listdir()
    assert FABRIC.load(home / "a/last.ckpt") == FABRIC.load("~/a/last.ckpt") == {"step": 1}
    assert FABRIC.load(f"file://{home}/b.ckpt") == FABRIC.load(f"file:{home}/b.ckpt") == {"step": 2}
    assert FABRIC.load(f"FILE://localhost{home}/with%20space%25.ckpt") == {"step": 3}
    assert FABRIC.load_module(f"file://{home}/m.safetensors", nn.Linear(1, 1)) == ((), ())


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("last.ckpt", "last.ckpt"),
        ("a:b/c", "a:b/c"),
        ("step=1:loss=0.5.ckpt", "step=1:loss=0.5.ckpt"),
        ("C:/runs/last.ckpt", "C:/runs/last.ckpt"),
        ("/data/s3:/x", "/data/s3:/x"),
        ("runs/~backup", "runs/~backup"),
    ],
)
def test_paths_stay_as_they_are(text: str, path: str) -> None:
    assert local_path(text, "f") == Path(path)


def test_what_is_nowhere_on_this_machine(home: Path) -> None:
    with pytest.raises(ValueError, match="there is no user ~nobody_has_this_name on this machine"):
        FABRIC.save("~nobody_has_this_name/last.ckpt", {})
    with pytest.raises(ValueError, match="a host name, and 'server' is not this machine"):
        FABRIC.save("file://server/last.ckpt", {})
    assert local_path("~backup.ckpt", "f") == Path.cwd() / "~backup.ckpt"
    assert local_path("./~/last.ckpt", "f") == Path.cwd() / "~/last.ckpt"
    assert not os.listdir() and not os.listdir(home)
