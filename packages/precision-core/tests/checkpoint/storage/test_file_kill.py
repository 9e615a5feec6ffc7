"""Processes killed at random moments of a save: the last complete checkpoint always loads."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core import Fabric
from precision_core.checkpoint.error import RESERVED
from precision_core.checkpoint.storage.file import read

FABRIC = Fabric(accelerator="cpu")


def save_forever(path: Path, first: int) -> None:
    """Saves checkpoints number `first`, `first` + 1, ..., and prints each number once its save is over."""
    for number in itertools.count(first):
        FABRIC.save(path, {"number": number, "large": torch.full((50_000,), number), "small": torch.tensor(number)})
        os.write(1, b"%d\n" % number)


SCRIPT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_file_kill import save_forever
save_forever(Path(sys.argv[1]), int(sys.argv[2]))
"""


def is_whole(content: dict[str, Any], at_least: int) -> bool:
    number = content["number"]
    return bool(
        number >= at_least
        and content["small"] == number
        and torch.equal(content["large"], torch.full((50_000,), number))
        and RESERVED in content
    )


def fork(path: Path, first: int) -> tuple[int, int]:
    """Starts a process that saves; returns its id and what to read its output from."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(writer, 1)
        save_forever(path, first)
    os.close(writer)
    return process, reader


def numbers(output: bytes) -> list[int]:
    return [int(line) for line in output.split(b"\n")[:-1]]


def kill_at_random(folder: Path, forked: int, fresh: int, seed: int = 0) -> tuple[int, int]:
    """Returns how often the last complete checkpoint did not load, and how many saves were complete."""
    dice, path, last, lost = random.Random(seed), folder / "last.ckpt", 0, 0
    start = time.perf_counter()
    for _ in range(10):
        FABRIC.save(path, {"number": 0, "large": torch.full((50_000,), 0), "small": torch.tensor(0)})
    typical = (time.perf_counter() - start) / 10
    for number in range(forked):
        process, reader = fork(path, last + 1)
        first = os.read(reader, 64) if number % 2 else b""  # half of them have saved once, however busy the machine is
        time.sleep(dice.uniform(0.0, 4 * typical))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with os.fdopen(reader, "rb") as output:
            last = max([last, *numbers(first + output.read())])
        lost += not is_whole(read(path), last)
        last = read(path)["number"]
    for number in range(fresh):
        path = folder / f"{number}.ckpt"
        with subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), "0"], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            first = child.stdout.readline()
            time.sleep(dice.uniform(0.0, 4 * typical))
            child.kill()
            lost += not is_whole(read(path), max(numbers(first + child.stdout.read())))
    return lost, last


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("forked", "fresh"), [(30, 0), pytest.param(200, 5, marks=pytest.mark.full)])
def test_the_last_complete_checkpoint_loads_whenever_a_process_is_killed(
    forked: int, fresh: int, tmp_path: Path
) -> None:
    lost, saved = kill_at_random(tmp_path, forked, fresh)
    print(f"tried {forked + fresh}, lost {lost}")
    assert lost == 0 and saved >= forked / 2
    FABRIC.save(tmp_path / "last.ckpt", {"number": 0})
    assert [name for name in os.listdir(tmp_path) if name.startswith(".last")] == []
