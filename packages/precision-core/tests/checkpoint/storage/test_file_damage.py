"""Damaged, foreign and hostile checkpoint files: refused with a reason, never loaded wrong, never executed."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import CheckpointError
from precision_core.checkpoint.error import RESERVED
from precision_core.checkpoint.storage.file import FORMAT_VERSION, read, write

HEADER = {RESERVED: {"version": FORMAT_VERSION, "precision": {}, "rng": {}}}
WEIGHTS = torch.arange(6.0).reshape(2, 3)
PLAIN = {"step": 3, "nested": {"a": [1.5, None, (True, "x")]}, **HEADER}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    write(path, {"weights": WEIGHTS, **PLAIN})
    return path


def is_whole(loaded: dict[str, Any]) -> bool:
    weights = loaded.pop("weights")
    return weights.dtype is torch.float32 and torch.equal(weights, WEIGHTS) and loaded == PLAIN


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
            assert is_whole(read(path)), place
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
    with pytest.raises(CheckpointError, match="data/0 has attributes that torch does not write"):
        read(path)


def test_a_cut_file_is_found_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 41), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged, or not a checkpoint"):
            read(path)


def test_zeroed_and_doubled_blocks_are_found(path: Path) -> None:
    whole = path.read_bytes()
    for start in range(0, len(whole) - 64, 64):
        for block in (bytes(64), whole[start - 64 : start] or bytes(64)):
            path.write_bytes(whole[:start] + block + whole[start + 64 :])
            with contextlib.suppress(CheckpointError):
                assert is_whole(read(path)), start


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
        (b"", "is damaged, or not a checkpoint"),
        (b"step: 3\n", "is damaged, or not a checkpoint"),
        (pickle.dumps({"step": 3}), "is damaged, or not a checkpoint"),
        (zipped(readme_txt=b"hello"), "is damaged, or not a checkpoint"),
        (zipped(data_pkl=b"hello", version=b"3"), "is damaged, or not a checkpoint|not written by Fabric.save"),
        (torch_file({"step": 3}, _use_new_zipfile_serialization=False), "is damaged, or not a checkpoint"),
        (torch_file({"step": 3}), r"was not written by Fabric.save: it has no '__precision__' record"),
        (torch_file([1]), r"Read it with torch.load\(path, weights_only=True\)"),
        (torch_file({RESERVED: 3}), "was not written by Fabric.save"),
        (
            torch_file(nn.Linear(1, 1)),
            r"not written by Fabric.save: it holds objects that torch.load\(weights_only=True\) rejects. trust=True",
        ),
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
