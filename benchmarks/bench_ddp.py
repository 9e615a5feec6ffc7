"""Time of a DDP step through Fabric beside torch's DistributedDataParallel in a loop written by hand, on two CPU ranks.

Both run in the same two processes, step by step in turn, in the same order on both ranks; wall time, since ranks wait
for each other. Shown is the median of the ratios pair by pair on rank zero, over the quieter half of the pairs.

Target: at most 1.02 times the hand-written loop.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch
from _measure import Step, interleave, print_table, verdict
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from precision_core import Fabric

WIDTH, BATCH = 256, 16
TARGET = 1.02


def main() -> None:
    options = argparse.ArgumentParser(description="DDP step beside the hand-written loop.")
    options.add_argument("--rounds", type=int, default=400, help="pairs of steps in each row")
    options.add_argument("--steps", type=int, default=1, help="steps in a block")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    Fabric(accelerator="cpu", devices=2).launch()
    torch.set_num_threads(1)
    rows = []
    for mode in ("32-true", "bf16-mixed"):
        ours, theirs = fabric_loop(mode), hand_loop(mode)
        for _ in range(20):
            ours()
            theirs()
        result = interleave(ours, theirs, given.rounds, given.steps, clock=time.perf_counter)
        cells = [f"{result.ours * 1e6:.0f}", f"{result.theirs * 1e6:.0f}", f"{result.ratio:.3f}"]
        rows.append([mode, *cells, f"{result.low:.3f} to {result.high:.3f}", verdict(result.ratio, TARGET)])
    if torch.distributed.get_rank() == 0:
        print_table("DDP step, two ranks", ["mode", "us a step", "by hand", "ratio", "quartiles", "target"], rows)


def start() -> tuple[nn.Module, AdamW, torch.Tensor, torch.Tensor]:
    """Returns a model, an optimizer and this rank's batch; the same ones at each call."""
    torch.manual_seed(torch.distributed.get_rank())
    inputs, targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)))
    return model, AdamW(model.parameters(), lr=1e-4), inputs, targets


def fabric_loop(mode: str) -> Step:
    """Returns a step through Fabric."""
    fabric = Fabric(accelerator="cpu", devices=2, precision=mode)
    model, optimizer, inputs, targets = start()
    fabric.setup(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()

    return step


def hand_loop(mode: str) -> Step:
    """Returns a step in plain PyTorch."""
    model, optimizer, inputs, targets = start()
    engine = DistributedDataParallel(model)

    def step() -> None:
        optimizer.zero_grad()
        with nullcontext() if mode == "32-true" else torch.autocast("cpu", torch.bfloat16):
            loss = mse_loss(engine(inputs), targets)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
