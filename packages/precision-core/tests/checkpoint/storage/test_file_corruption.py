"""Corrupted checkpoints, by the thousand: each loads with every value equal, or is refused by CheckpointError."""

from __future__ import annotations

import copy
import io
import pickle
import random
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from precision_core import CheckpointError, Fabric


class Run:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.fabric = Fabric(accelerator="cpu")
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.model, self.optimizer = self.fabric.setup(model, AdamW(model.parameters(), lr=0.1 * (1 + seed)))
        self.fabric.backward(self.model(torch.randn(4, 6)).sum())
        self.optimizer.step()
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "step": seed, "tag": "x" * 50}

    def values(self) -> list[Any]:
        optimizer = self.optimizer.state_dict()
        return copy.deepcopy([self.model.state_dict(), optimizer, self.state["step"], torch.get_rng_state()])


def test_a_file_that_is_only_repacked_loads(tmp_path: Path) -> None:
    """So what is refused of the repacked files below is refused for what is wrong with them."""
    saved, run, path = Run(1), Run(0), tmp_path / "last.ckpt"
    saved.fabric.save(path, saved.state)
    path.write_bytes(repacked(list(records(path.read_bytes()).items())))
    run.fabric.load(path, run.state)
    assert same(run.model.state_dict(), saved.model.state_dict())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


Damage = Callable[[bytes, random.Random, Path], bytes]


def records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repacked(parts: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    """Returns a zip file with right checksums, and fields as torch writes them."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", how) as archive:
        warnings.simplefilter("ignore")  # of two records with one name
        for name, part in parts:
            info = zipfile.ZipInfo(name)
            info.create_system, info.compress_type = 0, how
            archive.writestr(info, part)
            info.external_attr = 0
    return file.getvalue()


def one_bit(data: bytes, dice: random.Random, victim: Path) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def one_bit_of_the_directory(data: bytes, dice: random.Random, victim: Path) -> bytes:
    start = data.index(b"PK\1\2")
    return data[:start] + one_bit(data[start:], dice, victim)


def one_bit_of_a_header(data: bytes, dice: random.Random, victim: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = dice.choice(archive.infolist()).header_offset
    return data[:start] + one_bit(data[start : start + 30], dice, victim) + data[start + 30 :]


def many_bytes(data: bytes, dice: random.Random, victim: Path) -> bytes:
    start, size = dice.randrange(len(data)), dice.randrange(1, 500)
    return data[:start] + dice.randbytes(size) + data[start + size :]


def cut(data: bytes, dice: random.Random, victim: Path) -> bytes:
    return data[: dice.randrange(len(data))]


def longer(data: bytes, dice: random.Random, victim: Path) -> bytes:
    more = dice.randbytes(dice.randrange(1, 100))
    return more + data if dice.random() < 0.5 else data + more


def a_piece_moved(data: bytes, dice: random.Random, victim: Path) -> bytes:
    a, b, size = dice.randrange(len(data)), dice.randrange(len(data)), dice.randrange(1, 300)
    piece = data[a : a + size]
    return data[:b] + piece + data[b + len(piece) :]


def two_records_swapped(data: bytes, dice: random.Random, victim: Path) -> bytes:
    """In place: the file's structure is whole, the contents are each other's."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size == 32]
        (a, b), size = dice.sample(infos, 2), 32
    start, other = (
        info.header_offset + 30 + sum(struct.unpack_from("<2H", data, info.header_offset + 26)) for info in (a, b)
    )
    mixed = bytearray(data)
    mixed[start : start + size], mixed[other : other + size] = data[other : other + size], data[start : start + size]
    return bytes(mixed)


def a_record_twice(data: bytes, dice: random.Random, victim: Path) -> bytes:
    parts = list(records(data).items())
    name, part = dice.choice(parts)
    name = name.upper() if dice.random() < 0.5 else name
    return repacked([*parts, (name, bytes(len(part)))])


def a_record_missing(data: bytes, dice: random.Random, victim: Path) -> bytes:
    parts = [(name, part) for name, part in records(data).items() if "/data" in name]
    del parts[dice.randrange(len(parts))]
    return repacked(parts)


def another_size(data: bytes, dice: random.Random, victim: Path) -> bytes:
    """One size in the directory, of a record, of the directory itself, or in a header."""
    changed = bytearray(data)
    signature, field = dice.choice(
        [(b"PK\1\2", 20), (b"PK\1\2", 24), (b"PK\5\6", 12), (b"PK\3\4", 18), (b"PK\3\4", 22)]
    )
    places = [place for place in range(len(data) - 4) if data[place : place + 4] == signature]
    struct.pack_into("<L", changed, dice.choice(places) + field, dice.choice([0, 1, 31, 33, 2**31, 2**32 - 1]))
    return bytes(changed)


def compressed(data: bytes, dice: random.Random, victim: Path) -> bytes:
    """A zip bomb, if it were large: mapped memory would hold the compressed bytes."""
    parts = list(records(data).items())
    return repacked(parts, dice.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))


def a_bomb(data: bytes, dice: random.Random, victim: Path) -> bytes:
    parts = records(data)
    name = next(name for name in parts if name.endswith("/data/0"))
    return repacked([*parts.items(), (name + "0", bytes(10**7))], zipfile.ZIP_DEFLATED)


class Executes:
    def __init__(self, victim: Path, function: Any) -> None:
        self.victim, self.function = victim, function

    def __reduce__(self) -> Any:
        if self.function is exec:
            return exec, (f"open({str(self.victim)!r}, 'w')",)
        return self.function, (str(self.victim), "w")


def hostile(data: bytes, dice: random.Random, victim: Path) -> bytes:
    file, attack = io.BytesIO(), Executes(victim, dice.choice([open, exec]))
    content = torch.load(io.BytesIO(data), weights_only=True)
    where = dice.choice([content, content["model"], content["optimizer"], content["__precision__"], None])
    if where is None:
        return pickle.dumps(attack)
    where[dice.choice(["attack", next(iter(where))])] = attack
    torch.save(content, file)
    return file.getvalue()


def of_another_model(data: bytes, dice: random.Random, victim: Path) -> bytes:
    file, model = io.BytesIO(), nn.Sequential(nn.Linear(6, dice.choice([7, 9])))
    content = torch.load(io.BytesIO(data), weights_only=True)
    torch.save({**content, "model": model.state_dict()}, file)
    return file.getvalue()


DAMAGES: dict[Damage, int] = {
    one_bit: 25,
    one_bit_of_the_directory: 15,
    one_bit_of_a_header: 10,
    many_bytes: 5,
    cut: 10,
    longer: 4,
    a_piece_moved: 5,
    two_records_swapped: 4,
    a_record_twice: 3,
    a_record_missing: 2,
    another_size: 6,
    compressed: 2,
    a_bomb: 1,
    hostile: 3,
    of_another_model: 1,
}


def try_one(damage: Damage, run: Run, whole: bytes, expected: list[Any], dice: random.Random, path: Path) -> str:
    """Returns "equal" or "refused", or else what went wrong; the run has its old values after either."""
    victim = path.parent / "created"
    path.write_bytes(damage(whole, dice, victim))
    before = run.values()
    try:
        run.fabric.load(path, run.state)
        result = "equal" if same(run.values(), expected) else "loaded with other values"
    except CheckpointError:
        result = "refused" if same(run.values(), before) else "refused, but values changed"
    except Exception as error:
        result = f"raised {type(error).__name__}: {error}"
    return "executed" if victim.exists() else result


def corrupt_at_random(folder: Path, tries: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """Returns how often each kind of damage had which result."""
    path, dice = folder / "last.ckpt", random.Random(seed)
    saved, run = Run(1), Run(0)
    saved.fabric.save(path, saved.state)
    whole, expected = path.read_bytes(), saved.values()
    seen: Counter[tuple[str, str]] = Counter()
    for damage in dice.choices(list(DAMAGES), list(DAMAGES.values()), k=tries):
        result = try_one(damage, run, whole, expected, dice, path)
        seen[damage.__name__, result] += 1
        if result != "refused":
            run = Run(0)
    return seen


@pytest.mark.parametrize("tries", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_corrupted_checkpoints(tries: int, tmp_path: Path) -> None:
    seen = corrupt_at_random(tmp_path, tries)
    equal, refused = (
        sum(count for (_, result), count in seen.items() if result == wanted) for wanted in ("equal", "refused")
    )
    print(f"tried {tries}, {equal} equal, {refused} refused, lost {tries - equal - refused}")
    assert equal + refused == tries, seen
    assert refused > tries / 2 and len(seen) >= len(DAMAGES)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_each_kind_of_damage_is_one(damage: Damage, tmp_path: Path) -> None:
    saved = Run(1)
    saved.fabric.save(tmp_path / "last.ckpt", saved.state)
    whole = (tmp_path / "last.ckpt").read_bytes()
    assert damage(whole, random.Random(1), tmp_path / "created") != whole
    if damage not in (one_bit, one_bit_of_the_directory, one_bit_of_a_header, many_bytes, a_piece_moved, another_size):
        dice, run = random.Random(2), Run(0)
        assert try_one(damage, run, whole, [], dice, tmp_path / "last.ckpt") == "refused"
