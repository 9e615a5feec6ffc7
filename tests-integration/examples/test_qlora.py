"""Adapters around 4-bit weights learn, on one device and sharded, and are saved alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_core.testing import run_in_ranks

for name in ("precision_bnb", "precision_fsdp", "transformers", "peft"):
    pytest.importorskip(name, reason=f"{name} is not installed here")

# peft asks transformers by the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PACKED = 14
"""Linear layers of two blocks; the head stays as it is."""


def test_it_learns_on_one_device(example: Callable[..., Any], tmp_path: Path) -> None:
    result = example("qlora", "--tiny", "--out", str(tmp_path / "adapters.ckpt"))
    assert result["packed"] == PACKED
    assert result["after"] < result["before"] - 1.0
    saved = torch.load(tmp_path / "adapters.ckpt", weights_only=True)["model"]
    assert len(saved) == 2 * PACKED
    assert all("lora_" in name and value.dtype is torch.float32 for name, value in saved.items())


@pytest.mark.full
def test_it_learns_alike_in_shards(example: Callable[..., Any]) -> None:
    (one,) = run_in_ranks(1, example, "qlora", "--tiny")
    for result in run_in_ranks(2, example, "qlora", "--tiny", "--strategy", "fsdp", "--devices", "2"):
        assert result["ranks"] == 2 and result["packed"] == PACKED
        assert result["before"] == pytest.approx(one["before"], abs=0.02)
        assert result["after"] < result["before"] - 1.0
