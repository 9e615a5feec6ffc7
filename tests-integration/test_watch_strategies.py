"""`precision_lab.watch` around our Fabric on two ranks: the same bits with each strategy; the first rank is named."""

from __future__ import annotations

import gc
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precision_lab
from precision_core import Fabric
from precision_core.testing import run_in_ranks
from precision_lab.explaining.symptoms import symptoms

STEPS, AT = 5, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def strategy_of(name: str) -> Any:
    if name.startswith("deepspeed"):
        from precision_deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(int(name[-1]))
    return name


def train(strategy: str, mode: str, path: str, bad: int | None) -> Any:
    """Returns the losses, the alarms and the steps that were seen, of this rank; without a path nothing is watched."""
    warnings.simplefilter("ignore")  # the libraries'
    found = run(strategy, mode, path, bad)
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return found


def run(strategy: str, mode: str, path: str, bad: int | None) -> Any:
    fabric = Fabric(precision=mode, accelerator="cpu", devices=2, strategy=strategy_of(strategy))
    fabric.launch()
    torch.manual_seed(0)
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    torch.manual_seed(fabric.global_rank)
    losses = []
    watching: Any = precision_lab.watch(model, optimizer, every=2, file=path) if path else nullcontext()
    with watching as watched:
        for number in range(1, STEPS + 1):
            x = torch.randn(4, 4)
            if number == AT and fabric.global_rank == bad:
                x[1, 2] = torch.nan
            loss = model(x).float().square().mean()
            losses.append(loss.item())
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    if watched is None:
        return losses, [], 0
    assert all(each.explanation is not None for each in watched.alarms)
    alarms = [
        (each.kind, each.step, each.explanation.kind, " ".join(each.explanation.notes)) for each in watched.alarms
    ]
    return losses, alarms, watched.steps


STRATEGIES = ["ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3"]


@pytest.mark.full
@pytest.mark.parametrize("strategy, mode", [*((each, "bf16-mixed") for each in STRATEGIES), ("fsdp", "32-true")])
def test_two_ranks(tmp_path: Path, strategy: str, mode: str) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    alone = run_in_ranks(2, train, strategy, mode, "", None, timeout=120)
    path = str(tmp_path / "run.jsonl")
    watched = run_in_ranks(2, train, strategy, mode, path, None, timeout=120)
    for (losses, *_), (others, alarms, steps) in zip(alone, watched, strict=True):
        assert losses == others and alarms == [] and steps == STEPS
    path = str(tmp_path / "bad.jsonl")
    _, one = run_in_ranks(2, train, strategy, mode, path, 1, timeout=120)
    assert one[1][0][:3] == ("loss", AT, "bad data")
    # A forward of what is spread over ranks would wait for the other one.
    assert ("nothing was run once more" in one[1][0][3]) is (strategy in ("fsdp", "deepspeed_3"))
    first = symptoms(path).first
    assert first is not None and (first.kind, first.rank, first.step) == ("one rank alone", 1, AT)
