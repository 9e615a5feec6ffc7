"""Checkpoints of one strategy's engine under another: weights by value, where both shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_core import Fabric
from precision_core.checkpoint import CheckpointError
from precision_core.testing import run_in_ranks

pytest.importorskip("precision_deepspeed", reason="precision-deepspeed is not installed here")
pytest.importorskip("deepspeed", reason="deepspeed is not installed here")
pytest.importorskip("precision_fsdp", reason="precision-fsdp is not installed here")


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def written(folder: Path) -> None:
    from precision_deepspeed import DeepSpeedStrategy

    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(3))
    model, optimizer = fabric.setup(*make(0))
    fabric.backward(model(torch.ones(4, 3)).pow(2).mean())
    optimizer.step()
    fabric.save(folder / "last", {"model": model, "optimizer": optimizer})
    fabric.teardown()


def read_by_fsdp(folder: Path) -> dict[str, torch.Tensor]:
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    model, optimizer = fabric.setup(*make(1))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with pytest.raises(CheckpointError, match=r"optimizer: DeepSpeed's.*consolidated_optimizer_state_dict"):
        fabric.load(folder / "last", state)
    fabric.load(folder / "last", {"model": model})
    return {name: param.full_tensor().detach() for name, param in model.named_parameters()}  # type: ignore[attr-defined]


def test_fsdp_reads_what_deepspeed_wrote(tmp_path: Path) -> None:
    run_in_ranks(3, written, tmp_path)
    right, optimizer = make(0)
    right(torch.ones(4, 3)).pow(2).mean().backward()
    optimizer.step()
    for values in run_in_ranks(2, read_by_fsdp, tmp_path):
        for name, param in right.named_parameters():
            torch.testing.assert_close(values[name], param.detach(), rtol=1e-6, atol=1e-7)
