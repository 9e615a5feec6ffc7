"""Memory: a float file becomes packed weights with one chunk of floats in memory at a time."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from precision_bnb import BitsandbytesPrecision
from precision_core import Fabric
from precision_core.testing import run_in_ranks

WIDTH, LAYERS = 3072, 3  # 38 MB each: from 32 MB on malloc keeps nothing that was freed


def peak(function: Callable[[], Any]) -> int:
    """Returns how many bytes more than before `function` had at its peak."""

    def anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def watch() -> None:
        while not done.wait(0.003):
            seen.append(anonymous())

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what others freed would be taken first
    done, before, seen = threading.Event(), anonymous(), list[int]()
    thread = threading.Thread(target=watch)
    thread.start()
    kept = function()
    done.set()
    thread.join()
    highest = max([*seen, anonymous()])
    del kept
    return highest - before


def measured(path: Path) -> tuple[int, int, int]:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.float32))
    fabric.precision_plugin.convert_module(nn.Sequential(nn.Linear(64, 64)))  # what is allocated once
    with fabric.init_module():
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    more = peak(lambda: fabric.load_module(path, model))
    floats = peak(lambda: torch.ones(LAYERS, WIDTH, WIDTH))
    return more, floats, sum(param.nbytes for param in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_float_model_never_exists(tmp_path: Path) -> None:
    layer = torch.randn(WIDTH, WIDTH)
    save_file({f"{n}.weight": layer + n for n in range(LAYERS)}, tmp_path / "floats.safetensors")
    [(more, floats, packed)] = run_in_ranks(1, measured, tmp_path / "floats.safetensors")
    assert more < 1.15 * packed + layer.nbytes
    assert floats > 0.9 * LAYERS * layer.nbytes  # the measure measures
