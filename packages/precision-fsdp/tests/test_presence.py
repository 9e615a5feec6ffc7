"""A save of one rank alone under FSDP: an error there, in seconds, whatever the other one goes on with."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from precision_core import CheckpointError, Fabric
from precision_core.checkpoint import presence
from precision_core.testing import run_in_ranks


def alone(folder: Path, goes_on: str) -> tuple[str, float]:
    fabric = Fabric(accelerator="cpu", strategy="fsdp", devices=2)
    model = fabric.setup(nn.Linear(2, 2))
    said, began = "", time.monotonic()
    if fabric.is_global_zero:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as caught:
            patch.setattr(presence, "_PATIENCE", 0.2)
            fabric.save(folder / "c", {"model": model})
        said = str(caught.value)
    took = time.monotonic() - began
    if goes_on == "backward":
        fabric.backward(model(torch.ones(1, 2)).sum())
        fabric.save(folder / "c", {"model": model})
    fabric.teardown()
    return said, took


@pytest.mark.parametrize("goes_on", ["backward", "end"])
def test_a_save_of_one_rank_alone(goes_on: str, tmp_path: Path) -> None:
    (said, took), (other, _) = run_in_ranks(2, alone, tmp_path, goes_on)
    what = "has ended" if goes_on == "end" else r"has gone on (a backward, another collective)"
    assert said.startswith(
        f"fabric.save was called on rank 0, and rank 1 {what} without calling it. All ranks must call"
    )
    assert took < 10 and other == ""
