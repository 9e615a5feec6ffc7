"""The FP8 reference under DDP and FSDP2: two ranks are one process, and go on bit for bit where they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_te.reference import ReferenceLinear

Run = tuple[Fabric, nn.Module, torch.optim.Optimizer]


def start(mode: str, strategy: str, devices: int) -> Run:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", precision=mode, strategy=strategy, devices=devices)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fabric.setup(model, optimizer)
    assert isinstance(model[0], ReferenceLinear) and isinstance(model[3], ReferenceLinear)
    return fabric, model, optimizer


def steps(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    """Returns this rank's losses on its share of each batch."""
    losses = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        batch = torch.randn(2, 16, 32, generator=generator)
        x, target = batch.chunk(fabric.world_size, dim=1)[fabric.global_rank]
        optimizer.zero_grad()
        loss = mse_loss(model(x), target)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in model.state_dict().items()
    }


def in_rank(mode: str, strategy: str, path: Path) -> tuple[list[float], dict[str, Any]]:
    run = start(mode, strategy, 2)
    losses, state = steps(*run, range(6)), whole(run[1])
    half = start(mode, strategy, 2)
    steps(*half, range(3))
    half[0].save(path, {"model": half[1], "optimizer": half[2]})
    resumed = start(mode, strategy, 2)
    resumed[0].load(path, {"model": resumed[1], "optimizer": resumed[2]})
    assert steps(*resumed, range(3, 6)) == losses[3:]
    again = whole(resumed[1])
    assert again.keys() == state.keys() and all(torch.equal(again[name], value) for name, value in state.items())
    return losses, {name: value.tolist() for name, value in state.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("mode", "bound"), [("fp8-reference", 0.01), ("mxfp8-reference", 0.002)])
def test_two_ranks_are_one_process_and_resume_bit_for_bit(
    mode: str, bound: float, strategy: str, tmp_path: Path
) -> None:
    """`bound` is FP8's: the gradient of a mean over half a batch is quantised with another scale."""
    (first, one), (second, two) = run_in_ranks(2, in_rank, mode, strategy, tmp_path / "half.ckpt")
    assert one == two and sum(name.endswith("_extra_state") for name in one) == (2 if mode == "fp8-reference" else 0)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert mean == pytest.approx(steps(*start(mode, "auto", 1), range(6)), rel=bound)
