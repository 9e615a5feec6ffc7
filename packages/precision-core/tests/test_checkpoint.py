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
import pickle
import random
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from precision_core import CheckpointError
from precision_core.checkpoint import FORMAT_VERSION, RESERVED, read, write
from torch import Tensor, nn

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
    "keys": {1: "a", 1.5: "b", None: "c", True: "d", ("x", 2): "e", b"y": "f"},
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
    with pytest.raises(ValueError, match=r"\['models'\]\[0\]: a torch.nn.*Linear.*put it under a key of its own"):
        write(Path("unused"), {"models": [nn.Linear(1, 1)]})


# ---------------------------------------------------------------- all or nothing


def test_who_has_the_old_file_open_goes_on_reading_it(path: Path) -> None:
    before = path.read_bytes()
    with open(path, "rb") as file:
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


# ---------------------------------------------------------------- damaged and foreign files


def test_a_flipped_bit_is_found_or_makes_no_difference(path: Path) -> None:
    whole = path.read_bytes()
    dice = random.Random(0)
    directory = whole.index(b"PK\x01\x02")  # where names, sizes, offsets and attributes stand
    places = [dice.randrange(len(whole)) for _ in range(200)] + list(range(directory, len(whole), 3))
    found = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(read(path), content()), place
        except CheckpointError:
            found += 1
    assert found > len(places) / 3


def test_a_record_marked_as_a_folder_is_found(path: Path) -> None:
    """torch reads no bytes of such a record and returns a tensor of whatever lay in memory."""
    whole = bytearray(path.read_bytes())
    name = whole.rindex(b"/data/0")
    entry = whole.rindex(b"PK\x01\x02", 0, name)
    whole[entry + 38] ^= 0x10  # the external attributes in the central directory
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="data/0 does not match its checksum"):
        read(path)


def test_a_cut_file_is_found_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 41), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged, or no checkpoint"):
            read(path)


def test_zeroed_and_doubled_blocks_are_found(path: Path) -> None:
    whole = path.read_bytes()
    for start in range(0, len(whole) - 64, 64):
        for block in (bytes(64), whole[start - 64 : start] or bytes(64)):
            path.write_bytes(whole[:start] + block + whole[start + 64 :])
            try:
                assert same(read(path), content()), start
            except CheckpointError:
                pass


class CreatesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def zipped(**records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", data)
    return file.getvalue()


def torch_file(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged, or no checkpoint"),
        (b"step: 3\n", "is damaged, or no checkpoint"),
        (pickle.dumps({"step": 3}), "is damaged, or no checkpoint"),
        (zipped(readme_txt=b"hello"), "is damaged, or no checkpoint"),
        (zipped(data_pkl=b"hello", version=b"3"), "is damaged, or no checkpoint|not written by Fabric.save"),
        (torch_file({"step": 3}, _use_new_zipfile_serialization=False), "is damaged, or no checkpoint"),
        (torch_file({"step": 3}), r"was not written by Fabric.save: it has no '__precision__' record"),
        (torch_file([1]), r"Read it with torch.load\(path, weights_only=True\)"),
        (torch_file({RESERVED: 3}), "was not written by Fabric.save"),
        (torch_file(nn.Linear(1, 1)), "was not written by Fabric.save: it holds objects that a safe load refuses"),
        (torch_file({RESERVED: {"version": 1}}), r"is incomplete: its '__precision__' record has only \['version'\]"),
        (
            torch_file({RESERVED: {**HEADER[RESERVED], "version": FORMAT_VERSION + 1}}),
            f"has format {FORMAT_VERSION + 1}, written by a newer precision-core; this one reads {FORMAT_VERSION}",
        ),
    ],
)
def test_a_foreign_file_is_an_error_that_says_so(data: bytes, message: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_hostile_file_is_not_executed(path: Path) -> None:
    victim = path.parent / "created"
    for data in (
        torch_file({"x": CreatesAFile(victim), **HEADER}),
        torch_file(CreatesAFile(victim)),
        pickle.dumps(CreatesAFile(victim)),
        torch_file(CreatesAFile(victim), _use_new_zipfile_serialization=False),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read(path)
        assert not victim.exists()
    torch.load(io.BytesIO(torch_file(CreatesAFile(victim))), weights_only=False).close()
    assert victim.exists()  # it would have been


def test_a_folder_and_a_missing_file(path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        read(path.parent)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read(path.parent / "other.ckpt")
