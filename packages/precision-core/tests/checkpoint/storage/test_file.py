"""Checkpoint files: what goes in comes out, what could not come out does not go in, and damage never loads."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import io
import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from precision_core.checkpoint.error import RESERVED
from precision_core.checkpoint.storage.file import FORMAT_VERSION, read, save_with_checksums, write

HEADER = {RESERVED: {"version": FORMAT_VERSION, "precision": {}, "rng": {}}}
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


class Color(enum.IntEnum):
    RED = 1


def content() -> dict[str, Any]:
    return {"weights": torch.arange(6.0).reshape(2, 3), "step": 3, "nested": {"a": [1.5, None, (True, "x")]}, **HEADER}


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype is b.dtype and torch.equal(a.to_dense().float(), b.to_dense().float())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    write(path, content())
    return path


# ---------------------------------------------------------------- round trip

TAGGED = torch.ones(2)
TAGGED.tag = "kept"  # type: ignore[attr-defined]

SAVEABLE = {
    "numbers": [0, -1, 2**1900, 1.5, -0.0, math.inf, math.nan, 1j, True, None],
    "text": ["", "äö", "\ud800", b"\x00\xff", bytearray(b"x")],
    "tensors": [torch.tensor(1), torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True])],
    "odd tensors": [torch.ones(2).to(torch.float8_e4m3fn), torch.eye(3).to_sparse(), nn.Parameter(torch.ones(2))],
    "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
    "containers": [(), [], {}, {1, 2}, collections.OrderedDict(b=1, a=2), collections.Counter("abb")],
    "keys": {1: "a", 1.5: "b", None: "c", False: "d", ("x", 2): "e", b"y": "f"},
    "deep": [[[[[[{"a": ({"b": [1]},)}]]]]]],
    "shared twice": [[1]] * 2,
}


@pytest.mark.parametrize("name", SAVEABLE)
def test_what_goes_in_comes_out(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / "new" / "folder.ckpt"
    write(path, {"value": SAVEABLE[name], **HEADER})
    for loaded in (read(path), torch.load(path, weights_only=True)):
        assert same(loaded["value"], SAVEABLE[name])


def test_what_was_set_on_a_tensor_or_ordered_dict_comes_too(path: Path) -> None:
    ordered = collections.OrderedDict(a=1)
    ordered.version = 3  # type: ignore[attr-defined]
    write(path, {"tensor": TAGGED, "ordered": ordered, **HEADER})
    loaded = read(path)
    assert loaded["tensor"].tag == "kept" and loaded["ordered"].version == 3


# ---------------------------------------------------------------- refused before the old file is touched

LOOP: list[Any] = [1]
LOOP.append({"self": LOOP})
UNTAGGABLE = torch.ones(2)
UNTAGGABLE.tag = Path("x")  # type: ignore[attr-defined]

UNSAVEABLE = {
    "Namespace": argparse.Namespace(lr=1),
    "PosixPath": Path("x"),
    "float64": np.float64(1.0),
    "ndarray": np.ones(2),
    "range": range(3),
    "datetime": datetime.datetime(2026, 1, 1),
    "function": lambda: None,
    "type": dict,
    "Color": Color.RED,
    "Decimal": decimal.Decimal("0.1"),
    "frozenset": frozenset({1}),
    "defaultdict": collections.defaultdict(list),
    "int": 2**3000,
    "Generator": torch.Generator(),
    "it contains itself": LOOP,
    "PosixPath would": UNTAGGABLE,
    "no values": torch.ones(2, device="meta"),
}


@pytest.mark.parametrize("name", UNSAVEABLE)
def test_what_would_not_load_is_refused_by_its_key_and_the_old_file_stays(name: str, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"cannot save \['args'\]\[1\]\['x'\].*{name}"):
        write(path, {"fine": 1, "args": [0, {"x": UNSAVEABLE[name]}], **HEADER})
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.ckpt"]


def test_a_key_that_would_not_load_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot save the key .*PosixPath.* of \['a'\]"):
        write(Path("unused"), {"a": {Path("x"): 1}})


def test_an_object_with_state_dict_in_a_list_is_told_where_to_go() -> None:
    with pytest.raises(ValueError, match=r"\['models'\]\[0\]: a torch.nn.*Linear.*give it a key of its own"):
        write(Path("unused"), {"models": [nn.Linear(1, 1)]})


# ---------------------------------------------------------------- all or nothing


def test_checksums_are_written_where_torch_is_told_to_leave_them_out(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write(path, content())
        assert not torch.serialization.get_crc32_options()
        with pytest.raises(ValueError, match="cannot save"):
            write(path, {"x": object()})
        failing = {"weights": torch.ones(1), "x": argparse.Namespace}
        with pytest.raises(ValueError, match="cannot save"):
            write(path, failing)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read(path)["weights"], content()["weights"])


def test_saves_in_threads_leave_torchs_option_as_it_was(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            if not self.tell():
                barrier.wait(10)  # all of them are in the middle of it
            return super().write(data)

    files = [File() for _ in range(4)]
    threads = [threading.Thread(target=save_with_checksums, args=(content(), file)) for file in files]
    torch.serialization.set_crc32_options(False)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    for file in files:
        (tmp_path / "x").write_bytes(file.getvalue())
        assert same(read(tmp_path / "x")["weights"], content()["weights"])


def test_who_has_the_old_file_open_goes_on_reading_it(path: Path) -> None:
    before = path.read_bytes()
    with open(path, "rb", buffering=0) as file:
        start = file.read(100)
        write(path, {"other": 1, **HEADER})
        assert start + file.read() == before
    assert read(path)["other"] == 1


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    before = path.read_bytes()
    hooked = torch.ones(2, requires_grad=True)
    hooked.register_hook(print)  # torch warns at save that it is lost, and a warning is an error here
    with pytest.raises(UserWarning, match="hook"):
        write(path, {"fine": torch.ones(10), "hooked": hooked, **HEADER})
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.ckpt"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            write(path, {"large": torch.zeros(2**20), **HEADER})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.ckpt"]


def test_a_folder_at_the_path_stays_too(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write(tmp_path / "folder", content())
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == []


@pytest.mark.skipif(AS_ROOT, reason="root writes anywhere")
def test_a_read_only_folder_is_an_error_and_reads(path: Path) -> None:
    before = path.read_bytes()
    path.parent.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            write(path, content())
        assert same(read(path), content())
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        write(tmp_path / "new.ckpt", content())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new.ckpt").stat().st_mode) == 0o666 & ~umask
