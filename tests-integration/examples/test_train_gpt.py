"""The GPT learns on one device, and and alike by DDP and FSDP, whose checkpoints it resumes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precision_core.testing import run_in_ranks

START = 5.55
"""The loss of equal chances for all 256 bytes, in nats."""


def test_it_learns_on_one_device(example: Callable[..., Any]) -> None:
    result = example("train_gpt", "--tiny", "--accelerator", "cpu")
    assert result["ranks"] == 1
    assert result["held_out"] < 0.55 * START


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_it_learns_on_two_devices_and_resumes(example: Callable[..., Any], strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("precision_fsdp", reason="precision-fsdp is not installed here")
    options = ("--accelerator", "cpu", "--devices", "2", "--strategy", strategy, "--checkpoint", str(tmp_path / "last"))
    results = run_in_ranks(2, example, "train_gpt", "--tiny", *options)
    assert all(result["ranks"] == 2 and result["held_out"] < 0.55 * START for result in results)
    assert run_in_ranks(2, example, "train_gpt", "--tiny", *options, "--resume") == results  # no step is left to do
