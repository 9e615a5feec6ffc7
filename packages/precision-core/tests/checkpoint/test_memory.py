"""What a save and a load cost in memory, and that nothing depends on the mapped file afterwards."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from precision_core import CheckpointError, Fabric
from precision_core.checkpoint.storage import file as checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
LAYERS, WIDTH = 4, 3072  # 4 tensors of 36 MB, and as much momentum; from 32 MB on malloc keeps nothing that was freed
TENSOR = 4 * WIDTH**2


WATCH = """
import sys, time
highest = 0
while True:
    highest = max(highest, int(open(sys.argv[1]).read().split("RssAnon:")[1].split()[0]))
    print(highest, flush=True)
    time.sleep(0.001)
"""


def peak(function: Callable[[], Any]) -> int:
    """Returns how many bytes more than before `function` had at its peak.

    Another process watches, as torch.load lets no other thread of this one run.
    """
    watch = [sys.executable, "-S", "-c", WATCH, f"/proc/{os.getpid()}/status"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        before = 1024 * int(watcher.stdout.readline())
        function()
        watcher.kill()
        highest = [int(line) for line in watcher.stdout.read().splitlines() if line]
    return 1024 * max(highest) - before


def test_a_save_and_a_load_take_little_memory_besides_the_live_state(tmp_path: Path) -> None:
    fabric, path = Fabric(accelerator="cpu"), tmp_path / "last.ckpt"
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer}
    allowed = int(0.05 * 2 * LAYERS * TENSOR) + TENSOR
    fabric.save(path, {"model": nn.Linear(1, 1)})  # what is allocated once
    assert peak(lambda: fabric.save(path, state)) <= allowed
    assert peak(lambda: fabric.load(path, state)) <= allowed
    optimizer.state.clear()  # a run that begins: what is loaded becomes live
    assert peak(lambda: fabric.load(path, state)) <= LAYERS * TENSOR + allowed
    assert peak(lambda: torch.load(path, weights_only=True)) >= 0.9 * 2 * LAYERS * TENSOR  # the measure measures


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("copied", [True, False])
def test_a_file_that_is_cut_after_a_load_does_no_harm(copied: bool, tmp_path: Path) -> None:
    """Values that lie in a mapped file end the process with it: nothing that a load returns does."""
    fabric, path = Fabric(accelerator="cpu"), tmp_path / "last.ckpt"
    fabric.save(path, {"model": nn.Linear(300, 300)})
    process = os.fork()
    if process == 0:
        faulthandler.disable()
        loaded = fabric.load(path) if copied else torch.load(path, weights_only=True, mmap=True)
        os.truncate(path, 0)
        os._exit(int(loaded["model"]["weight"].sum().isnan()))
    status = os.waitpid(process, 0)[1]
    assert os.WTERMSIG(status) == (0 if copied else signal.SIGBUS)


def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric, path, load, calls = Fabric(accelerator="cpu"), tmp_path / "last.ckpt", torch.load, []
    fabric.save(path, {"value": 1})

    def load_late(*args: Any, **kwargs: Any) -> Any:
        if not calls:  # after its checksums were verified
            fabric.save(path, {"value": 2, "more": torch.ones(5)})
        calls.append(1)
        return load(*args, **kwargs)

    monkeypatch.setattr(checkpoint.torch, "load", load_late)
    assert fabric.load(path)["value"] == 2 and len(calls) == 2


def test_a_file_that_is_cut_while_it_is_verified_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric, path = Fabric(accelerator="cpu"), tmp_path / "last.ckpt"
    fabric.save(path, {"value": torch.ones(10**6)})
    crc = zipfile.crc32  # type: ignore[attr-defined]

    def cut(data: Any, start: int = 0) -> int:
        os.truncate(path, 10**6)
        return crc(data, start)

    monkeypatch.setattr(zipfile, "crc32", cut)
    with pytest.raises(CheckpointError, match="is damaged, or not a checkpoint"):
        fabric.load(path)
