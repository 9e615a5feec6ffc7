"""Damaged and hostile checkpoint folders: values equal or an error, nothing executed."""

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

from precision_core.checkpoint.error import FORMAT_VERSION, CheckpointError
from precision_core.checkpoint.storage.chunks import CHUNKS
from precision_core.checkpoint.storage.folder import Folder, write_folder
from precision_core.checkpoint.storage.manifest import MANIFEST

WEIGHTS = {f"w{number}": torch.arange(12.0).reshape(3, 4) + number for number in range(4)}
NAMES = [f"model.{name}" for name in WEIGHTS]
PLAIN = {"step": 3, "nested": [1.5, None, (True, "x")]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_folder(tmp_path / "whole", {"model": WEIGHTS, **PLAIN})
    return tmp_path / "whole"


def refused(folder: Path, match: str = "") -> bool:
    """Returns whether reading is refused; else what is read must be what was written."""
    try:
        read = Folder(folder).everything()
    except CheckpointError as error:
        assert match in str(error), error
        return True
    assert {key: read[key] for key in PLAIN} == PLAIN
    assert all(torch.equal(read["model"][name], weight) for name, weight in WEIGHTS.items())
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
    name = dice.choice(sorted(file.name for file in folder.iterdir() if file.name != CHUNKS))  # that one is the same
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


def put(file: str, value: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    return lambda folder, victim: (folder / file).write_bytes(value(victim)) and None


def editing(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    """Edits what chunks.json says of model.w0."""

    def edit(folder: Path, victim: Path) -> None:
        table = json.loads((folder / CHUNKS).read_text())
        change(table["model.w0"])
        (folder / CHUNKS).write_text(json.dumps(table))

    return edit


def chunk(*numbers: Any, at: int = 0) -> Callable[[Path, Path], None]:
    """Puts `numbers` into the chunk of model.w0, from the entry `at` on: its file, start, length, offsets, sizes."""
    return editing(lambda entry: entry["chunks"][0].__setitem__(slice(at, at + len(numbers)), numbers))


def split(*parts: tuple[list[Any], list[Any]]) -> Callable[[Path, Path], None]:
    """Has the chunk of model.w0 in parts: offsets and sizes of each."""
    return editing(lambda entry: entry.update(chunks=[[*entry["chunks"][0][:3], *part] for part in parts]))


def hostile_tensor(folder: Path, victim: Path) -> None:
    """One tensor of the four, the last that is read."""
    data, file = torch_file(CreatesAFile(victim)), folder / "__0_0.distcp"
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + data)
    table = json.loads((folder / CHUNKS).read_text())
    table["model.w3"]["chunks"][0][1:3] = start, len(data)
    (folder / CHUNKS).write_text(json.dumps(table))


def structure_of(tensor: torch.Tensor) -> Callable[[Path, Path], None]:
    """The one tensor of a folder, whatever chunks.json says of it; the latter agrees on shape and dtype."""

    def write(folder: Path, victim: Path) -> None:
        table = json.loads((folder / CHUNKS).read_text())
        entry = {**table["model.w0"], "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        entry["chunks"][0][3:] = [0] * tensor.dim(), list(tensor.shape)
        (folder / CHUNKS).write_text(json.dumps({"x": entry}))
        (folder / "structure.pt").write_bytes(torch_file({"x": tensor}))

    return write


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "structure": (put("structure.pt", lambda v: torch_file({"x": CreatesAFile(v)})), "not written by"),
    "structure, pickle": (put("structure.pt", lambda v: pickle.dumps(CreatesAFile(v))), "not written by"),
    "structure, no dict": (put("structure.pt", lambda _: torch_file([1])), "its structure is not a dict"),
    "structure, more": (put("structure.pt", lambda _: torch_file({"x": torch.ones(1, device="meta")})), "other"),
    "structure, gigantic": (structure_of(torch.empty(10**15, device="meta")), "for a chunk of tensor x of shape (1000"),
    "structure, wider": (structure_of(torch.empty(300, dtype=torch.float64, device="meta")), "for a chunk of tensor x"),
    "structure, narrower": (structure_of(torch.empty(3, 4, dtype=torch.half, device="meta")), "in torch.float16"),
    "structure, transposed": (structure_of(torch.empty(4, 3, device="meta")), "not a tensor of [4, 3] in"),
    "tensor": (hostile_tensor, "UnpicklingError"),
    "no JSON": (put(CHUNKS, lambda v: pickle.dumps(CreatesAFile(v))), "is invalid: UnicodeDecode"),
    "half of it": (put(CHUNKS, lambda _: b'{"model.w0": {'), "is invalid: JSONDecodeError"),
    "nested": (put(CHUNKS, lambda _: b"[" * 10**6), "is invalid: RecursionError"),
    "long number": (put(CHUNKS, lambda _: b"1" * 10**5), "is invalid: ValueError"),
    "no dict": (put(CHUNKS, lambda _: b"[]"), "is invalid: AttributeError"),
    "no dicts": (put(CHUNKS, lambda _: json.dumps(dict.fromkeys(NAMES)).encode()), "is invalid: TypeError"),
    "a tensor less": (put(CHUNKS, lambda _: json.dumps(dict.fromkeys(NAMES[1:])).encode()),
                      "tensors than expected: ['model.w0']"),
    "dtype": (editing(lambda entry: entry.update(dtype="torch.float16")), "another shape or dtype for tensor model.w0"),
    "shape": (editing(lambda entry: entry.update(shape=[4, 3])), "another shape or dtype for tensor model.w0"),
    "no chunks": (editing(lambda entry: entry.pop("chunks")), "is invalid: KeyError"),
    "chunks, none": (editing(lambda entry: entry["chunks"].clear()), "tensor model.w0 overlap, or miss elements"),
    "chunks, twice": (editing(lambda entry: entry["chunks"].extend(entry["chunks"])), "overlap, or miss"),
    "chunks, a number": (editing(lambda entry: entry["chunks"].append(3)), "is invalid: TypeError"),
    "path above": (chunk("../x"), "outside of the checkpoint's files"),
    "path of the manifest": (chunk(MANIFEST), "outside of the checkpoint's files"),
    "absolute path": (chunk("/etc/passwd"), "outside of the checkpoint's files"),
    "path, a list": (chunk([]), "is invalid: TypeError"),
    "start": (chunk(10**12, at=1), "outside of the checkpoint's files"),
    "start, negative": (chunk(-1, at=1), "outside of the checkpoint's files"),
    "start, text": (chunk("0", at=1), "invalid chunk for tensor model.w0"),
    "length, negative": (chunk(-1, at=2), "outside of the checkpoint's files"),
    "length, short": (chunk(47, at=2), "47 bytes are too few for a chunk of tensor model.w0 of shape (3, 4)"),
    "length, gigantic": (chunk(10**400, at=2), "outside of the checkpoint's files"),
    "length, not finite": (chunk(float("nan"), at=2), "invalid chunk for tensor model.w0"),
    "offsets, negative": (chunk([-1, 0], at=3), "invalid chunk for tensor model.w0"),
    "offsets, too few": (chunk([0], [3], at=3), "invalid chunk for tensor model.w0"),
    "offsets, truth": (chunk([False, False], at=3), "invalid chunk for tensor model.w0"),
    "sizes, negative": (chunk([-3, 4], at=4), "invalid chunk for tensor model.w0"),
    "sizes, none": (chunk([0, 4], at=4), "invalid chunk for tensor model.w0"),
    "sizes, gigantic": (chunk([10**30, 4], at=4), "chunk outside of tensor model.w0 of shape (3, 4)"),
    "sizes, too small": (chunk([2, 4], at=4), "overlap, or miss elements"),
    "overlap and a gap": (split(([0, 0], [2, 4]), ([1, 0], [1, 4])), "overlap, or miss elements"),
    "a gap": (split(([0, 0], [1, 4]), ([2, 0], [1, 4])), "overlap, or miss elements"),
    "crossing": (split(([0, 0], [3, 2]), ([0, 2], [1, 2]), ([0, 0], [1, 4])), "overlap, or miss elements"),
    "smaller tensors": (split(([0, 0], [3, 1]), ([0, 1], [3, 3])), "not a tensor of [3, 1] in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_and_not_executed(kind: str, path: Path) -> None:
    victim = path.parent / "created"
    attack, message = HOSTILE[kind]
    attack(path, victim)
    seal(path)
    assert refused(path, message) and not victim.exists()


def test_torchs_metadata_is_not_opened(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(CreatesAFile(path.parent / "created")))
    seal(path)
    assert not refused(path) and not (path.parent / "created").exists()


def test_files_that_change_after_they_were_verified_are_not_executed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, read_bytes = path.parent / "created", Path.read_bytes

    def change(file: Path) -> bytes:
        data = read_bytes(file)
        if file.name in (CHUNKS, "structure.pt"):
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


@pytest.mark.parametrize(("version", "age"), [(FORMAT_VERSION + 1, "a newer"), (1, "an older")])
def test_another_format_is_refused(version: int, age: str, path: Path) -> None:
    body = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**body, "version": version}))
    seal(path)
    assert refused(path, f"has format {version}, written by {age} precision-core; this one reads {FORMAT_VERSION}")


@pytest.mark.parametrize("body", [{}, {"version": "x"}, {"version": 2, "files": []}, {"version": 2, "files": {"a": 3}}])
def test_a_manifest_that_is_none_is_refused(body: dict[str, Any], path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({**body, "crc": zlib.crc32(json.dumps(body, sort_keys=True).encode())}))
    assert refused(path, "is not the manifest of a checkpoint")
