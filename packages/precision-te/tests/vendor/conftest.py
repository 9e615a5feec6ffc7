"""The one place that pretends: three queries for a GPU are answered, so that the vendor's library builds its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

_CACHED = ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT")


@pytest.fixture
def pretend(te: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Has torch and the vendor believe in a GPU of that compute capability; kernels are missing all the same."""
    from transformer_engine.pytorch import quantization, utils

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/cuda runs the real thing")

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        for module in (quantization, utils):
            monkeypatch.setattr(module, "get_device_compute_capability", lambda: capability)
        for name in _CACHED:
            monkeypatch.setattr(quantization, name, None)

    return pretend


@pytest.fixture
def hopper(pretend: Callable[[tuple[int, int]], None]) -> None:
    """A GPU with FP8, without MXFP8 and NVFP4."""
    pretend((9, 0))


@pytest.fixture
def blackwell(pretend: Callable[[tuple[int, int]], None]) -> None:
    """A GPU with all recipes."""
    pretend((10, 0))
