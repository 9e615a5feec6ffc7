"""Damaged and hostile module files: refused with a reason, and the model stays as it was."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.weights.files import load_module, save_module

INDEX = "model.safetensors.index.json"


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_module(tmp_path / "model.safetensors", model(0))
    return tmp_path / "model.safetensors"


def refused(path: Path, match: str = "") -> None:
    live = model(1)
    with pytest.raises(CheckpointError, match=match) as error:
        load_module(path, live)
    assert str(path.parent) in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(live.parameters(), model(1).parameters(), strict=True))


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another shape": lambda header: header["0.weight"].update(shape=[3, 5]),
    "another dtype": lambda header: header["0.weight"].update(dtype="F64"),
    "no dtype": lambda header: header["0.weight"].update(dtype="X7"),
    "negative shape": lambda header: header["0.weight"].update(shape=[-4, -3]),
    "huge shape": lambda header: header["0.weight"].update(shape=[2**62, 2**62]),
    "overlap": lambda header: header["0.weight"].update(data_offsets=header["1.weight"]["data_offsets"]),
    "past the end": lambda header: header["0.weight"].update(data_offsets=[10**6, 10**6 + 48]),
    "backwards": lambda header: header["0.weight"].update(data_offsets=[48, 0]),
    "a gap": lambda header: header.pop("0.weight"),
    "no offsets": lambda header: header["0.weight"].pop("data_offsets"),
    "no dict": lambda header: header.update({"0.weight": 3}),
    "metadata": lambda header: header.update(__metadata__={"precision.versions": "{"}),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_refused(kind: str, path: Path) -> None:
    with_header(path, LIES[kind])
    refused(path, "is damaged")


def test_a_cut_file_is_refused_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, "is damaged, or not a safetensors file")


@pytest.mark.parametrize("tries", [60, pytest.param(300, marks=pytest.mark.full)])
def test_a_flipped_bit_in_the_header_is_refused_or_makes_no_difference(tries: int, path: Path) -> None:
    """The values themselves have no checksum in this format."""
    whole = path.read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    dice = random.Random(0)
    found = 0
    for _ in range(tries):
        damaged = bytearray(whole)
        damaged[dice.randrange(size)] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        live = model(1)
        try:
            load_module(path, live)
        except CheckpointError:
            found += 1
            expected = model(1)
        else:
            expected = model(0)
        assert all(torch.equal(a, b) for a, b in zip(live.parameters(), expected.parameters(), strict=True))
    assert found > tries * 2 / 3


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\xff" * 16, json.dumps({"a": 1}).encode()])
def test_a_foreign_file_is_refused(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    refused(path, "is damaged, or not a safetensors file")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    save_module(folder, model(0), max_shard_size=100)
    return folder


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors", "x.bin", ""],
)
def test_an_index_that_points_elsewhere_is_refused(file: str, shards: Path, path: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["0.weight"] = file
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards / INDEX, "which is not a safetensors file beside it")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": {}}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'"weight_map"',
    ],
)
def test_a_damaged_index_is_refused(data: bytes, shards: Path) -> None:
    (shards / INDEX).write_bytes(data)
    is_empty = data == b'{"weight_map": {}}'
    refused(shards / INDEX, "lists no tensors" if is_empty else "is damaged, or not an index")


def test_a_shard_that_is_missing_swapped_or_doubled_is_refused(shards: Path) -> None:
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.unlink()
    refused(shards / INDEX, f"lists {first.name}, which is missing")
    first.write_bytes(other)
    refused(shards / INDEX, f"lists .* in {first.name}, which does not have them")
    second.write_bytes(one)
    refused(shards / INDEX, "which does not have them")
    second.write_bytes(other)
    first.write_bytes(one)
    (shards / "copy.safetensors").write_bytes(one)
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["0.weight"] = "copy.safetensors"
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards / INDEX, "is damaged: .* is in two of its files")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .* neither .*model.safetensors nor .*json"):
        load_module(tmp_path, model(0))
