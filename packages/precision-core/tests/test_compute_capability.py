"""Devices are told without CUDA, so that a process may fork ranks that use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from precision_core.compute_capability import compute_capability
from precision_core.hardware import FORMATS, is_available


@pytest.fixture(autouse=True)
def no_cuda_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def started() -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    monkeypatch.setattr(torch.cuda, "is_available", started)  # which initialises the driver


@pytest.mark.parametrize(
    ("answer", "capability", "bfloat16", "float16"),
    [
        ("9.0", (9, 0), "native", "native"),
        ("7.5\\n7.5\\n", (7, 5), "emulated", "native"),
        ("6.1", (6, 1), "emulated", "slow"),
    ],
)
def test_probes_ask_nvidia_smi(
    answer: str,
    capability: tuple[int, int],
    bfloat16: str,
    float16: str,
    nvidia_smi: Callable[[str], None],
    tmp_path: Path,
) -> None:
    nvidia_smi(answer)
    assert compute_capability() == capability
    probes = FORMATS["cuda"]
    assert (probes[torch.bfloat16]()[0], probes[torch.float16]()[0]) == (bfloat16, float16)
    assert not torch.cuda.is_initialized()
    asked = (tmp_path / "bin" / "nvidia-smi.asked").read_text().splitlines()
    assert asked == ["--query-gpu=compute_cap --format=csv,noheader"]  # once for all


@pytest.mark.parametrize("answer", ["", "9.0\\n8.0\\n", "Field is not valid", "1.2.3"])
def test_else_torch_is_asked(answer: str, nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(answer)
    with pytest.raises(AssertionError, match="CUDA was initialised"):
        compute_capability()


def test_whether_there_is_a_cuda_device_does_not_start_it() -> None:
    assert is_available("cuda") is (torch.cuda.device_count() > 0)
