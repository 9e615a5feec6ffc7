"""Damaged and hostile checkpoint folders: values equal or an error, nothing executed, live tensors as they were."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage.folder import read_folder, write_folder
from precision_core.checkpoint.storage.manifest import FORMAT_VERSION, MANIFEST

WEIGHTS = {f"w{number}": torch.arange(12.0).reshape(3, 4) + number for number in range(4)}
PLAIN = {"step": 3, "nested": [1.5, None, (True, "x")]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_folder(tmp_path / "whole", {"model": WEIGHTS, **PLAIN})
    return tmp_path / "whole"


def live() -> dict[str, Any]:
    return {"model": {name: torch.full((3, 4), -1.0) for name in WEIGHTS}}


def refused(folder: Path, match: str = "") -> bool:
    """Returns whether reading is refused, with nothing changed; else what is read must be what was written."""
    into = live()
    try:
        read = read_folder(folder, into)
    except CheckpointError as error:
        assert match in str(error), error
        assert all(bool((tensor == -1).all()) for tensor in into["model"].values())
        return True
    assert {key: read[key] for key in PLAIN} == PLAIN
    for name, weight in WEIGHTS.items():
        assert torch.equal(read["model"][name], weight) and torch.equal(into["model"][name], weight)
    return False


def flip(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)


def cut(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    os.truncate(file, dice.randrange(file.stat().st_size))


def remove(folder: Path, dice: random.Random) -> None:
    dice.choice(sorted(folder.iterdir())).unlink()


def swap(folder: Path, dice: random.Random) -> None:
    one, other = dice.sample(sorted(folder.iterdir()), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def zero(folder: Path, dice: random.Random) -> None:
    file = dice.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    start = dice.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    file.write_bytes(data)


def add(folder: Path, dice: random.Random) -> None:
    (folder / f"{dice.randrange(100)}.distcp").write_bytes(b"x")


def older(folder: Path, dice: random.Random) -> None:
    """A file of another save of the same shapes."""
    other = folder.with_name("other")
    write_folder(other, {"model": {name: -weight for name, weight in WEIGHTS.items()}, **PLAIN, "step": 4})
    name = dice.choice(sorted(file.name for file in folder.iterdir()))
    shutil.copy(other / name, folder / name)
    shutil.rmtree(other)


COUNTS = {flip: 160, cut: 40, remove: 10, swap: 20, zero: 60, add: 3, older: 12}


@pytest.mark.parametrize(
    ("damage", "count"),
    [
        *((damage, -(-count // 5)) for damage, count in COUNTS.items()),
        *(pytest.param(damage, count, marks=pytest.mark.full) for damage, count in COUNTS.items()),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path, random.Random], None], count: int, path: Path) -> None:
    dice = random.Random(0)
    found = 0
    for _ in range(count):
        folder = path.with_name("damaged")
        shutil.copytree(path, folder)
        damage(folder, dice)
        found += refused(folder)
        shutil.rmtree(folder)
    assert found >= count * 0.8  # zeros that were there before are no damage


# ---------------------------------------------------------------- with digests that are right


class CreatesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def seal(folder: Path) -> None:
    """Makes the manifest right again, as anybody can."""
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("crc")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != MANIFEST}
    body["files"] = {name: [len(data), zlib.crc32(data)] for name, data in files.items()}
    sealed = {**body, "crc": zlib.crc32(json.dumps(body, sort_keys=True).encode())}
    (folder / MANIFEST).write_text(json.dumps(sealed))


def torch_file(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def edit(folder: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


def put(file: str, value: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    return lambda folder, victim: (folder / file).write_bytes(value(victim)) and None


def editing(change: Callable[[Metadata, Path], Any]) -> Callable[[Path, Path], None]:
    return lambda folder, victim: edit(folder, lambda metadata: change(metadata, victim))


def hostile_bytes(folder: Path, victim: Path) -> None:
    """An entry of bytes, as torch has it for plain values, which its planner unpickles."""
    data = torch_file(CreatesAFile(victim))

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.w0"] = BytesStorageMetadata()
        for info in metadata.storage_data.values():
            vars(info).update(offset=0, length=len(data))

    edit(folder, change)
    (folder / "__0_0.distcp").write_bytes(data)


def hostile_tensor(folder: Path, victim: Path) -> None:
    """One tensor of the four, the last that is read."""
    data = torch_file(CreatesAFile(victim))
    file = folder / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + data)
    edit(folder, lambda metadata: vars(list(metadata.storage_data.values())[-1]).update(offset=size, length=len(data)))


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "metadata": (put(".metadata", lambda v: pickle.dumps(CreatesAFile(v))), "asks for io.open"),
    "metadata, protocol 0": (put(".metadata", lambda v: pickle.dumps(CreatesAFile(v), 0)), "opcode GLOBAL"),
    "metadata, planner": (editing(lambda m, v: setattr(m, "planner_data", {"x": CreatesAFile(v)})), "io.open"),
    "structure": (put("structure.pt", lambda v: torch_file({"x": CreatesAFile(v)})), "not written by"),
    "structure, pickle": (put("structure.pt", lambda v: pickle.dumps(CreatesAFile(v))), "not written by"),
    "structure, no dict": (put("structure.pt", lambda _: torch_file([1])), "holds no dict"),
    "structure, more": (put("structure.pt", lambda _: torch_file({"x": torch.ones(1, device="meta")})), "other"),
    "bytes": (hostile_bytes, "has bytes for the tensor model.w0"),
    "tensor": (hostile_tensor, "cannot be read: rank 0: UnpicklingError"),
    "path above": (editing(lambda m, _: vars(first(m)).update(relative_path="../x")), "outside of"),
    "path of the manifest": (editing(lambda m, _: vars(first(m)).update(relative_path=MANIFEST)), "outside of"),
    "absolute path": (editing(lambda m, _: vars(first(m)).update(relative_path="/etc/passwd")), "outside of"),
    "offset": (editing(lambda m, _: vars(first(m)).update(offset=10**12)), "outside of"),
    "negative offset": (editing(lambda m, _: vars(first(m)).update(offset=-1)), "outside of"),
    "negative length": (editing(lambda m, _: vars(first(m)).update(length=-1)), "outside of"),
    "transforms": (editing(lambda m, _: vars(first(m)).update(transform_descriptors=["x"])), "storage entry"),
    "shape": (editing(lambda m, _: setattr(m.state_dict_metadata["model.w0"], "size", torch.Size([9]))), "shape"),
    "dtype": (editing(lambda m, _: setattr(m.state_dict_metadata["model.w0"].properties, "dtype", torch.half)), ""),
    "no chunks": (editing(lambda m, _: m.state_dict_metadata["model.w0"].chunks.clear()), "0 of the 12 values"),
    "chunk": (editing(lambda m, _: m.state_dict_metadata["model.w0"].chunks.append(3)), "model.w0 that is none"),
    "storage": (editing(lambda m, _: m.storage_data.clear()), "cannot be read"),
    "no storage": (editing(lambda m, _: setattr(m, "storage_data", {})), "cannot be read"),
    "a tensor less": (editing(lambda m, _: m.state_dict_metadata.pop("model.w0")), "other tensors: ['model.w0']"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_and_not_executed(kind: str, path: Path) -> None:
    victim = path.parent / "created"
    attack, message = HOSTILE[kind]
    attack(path, victim)
    seal(path)
    assert refused(path, message)
    with pytest.raises(CheckpointError):
        read_folder(path)
    assert not victim.exists()


def test_files_that_change_after_they_were_verified_are_not_executed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, read_bytes = path.parent / "created", Path.read_bytes

    def change(file: Path) -> bytes:
        data = read_bytes(file)
        if file.name in (".metadata", "structure.pt"):
            file.write_bytes(pickle.dumps(CreatesAFile(victim)))
        return data

    monkeypatch.setattr(Path, "read_bytes", change)
    refused(path)
    monkeypatch.undo()
    assert refused(path) and not victim.exists()


def test_a_link_is_refused(path: Path) -> None:
    moved = path.parent / "moved"
    os.rename(path / "__0_0.distcp", moved)
    os.symlink(moved, path / "__0_0.distcp")
    assert refused(path, "__0_0.distcp has another size")


@pytest.mark.parametrize(
    ("name", "message"),
    [(MANIFEST, f"has no {MANIFEST}: its save was not finished"), ("structure.pt", "structure.pt is missing")],
)
def test_a_torn_folder_says_what_is_missing(name: str, message: str, path: Path) -> None:
    (path / name).unlink()
    assert refused(path, message)


def test_a_newer_format_is_refused(path: Path) -> None:
    body = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**body, "version": FORMAT_VERSION + 1}))
    seal(path)
    assert refused(path, f"has format {FORMAT_VERSION + 1}, written by a newer precision-core")


@pytest.mark.parametrize("body", [{}, {"version": "x"}, {"version": 1, "files": []}, {"version": 1, "files": {"a": 3}}])
def test_a_manifest_that_is_none_is_refused(body: dict[str, Any], path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({**body, "crc": zlib.crc32(json.dumps(body, sort_keys=True).encode())}))
    assert refused(path, "is no manifest of a checkpoint")
