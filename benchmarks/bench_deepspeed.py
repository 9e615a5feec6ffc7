"""Time of a DeepSpeed step through Fabric beside DeepSpeed's own engine in a loop written by hand.

Both run in the same processes, step by step in turn; wall time, or with `--cpu` the processor's time, which other
programs disturb less. Shown is the median of the ratios pair by pair on rank zero, over the quieter half of the pairs.
`torchrun --nproc-per-node=2 benchmarks/bench_deepspeed.py` runs two ranks.

Target: at most 1.02 times the hand-written loop.
"""

from __future__ import annotations

import argparse
import logging
import time
from importlib.util import find_spec

import torch
from _measure import Step, interleave, keep_freed_memory, print_table, verdict
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW

from precision_core import Fabric

BATCH = 16
TARGET = 1.02


def main() -> None:
    options = argparse.ArgumentParser(description="DeepSpeed step beside the hand-written loop.")
    options.add_argument("--rounds", type=int, default=400, help="pairs of steps in each row")
    options.add_argument("--steps", type=int, default=1, help="steps in a block")
    options.add_argument("--cpu", action="store_true", help="the time that the process computes, in place of wall time")
    options.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="of ZeRO")
    options.add_argument("--width", type=int, default=256, help="features of each of the four layers")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    if find_spec("precision_deepspeed") is None:
        print("\nDeepSpeed step: left out, precision-deepspeed is not installed")
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    clock = time.process_time if given.cpu else time.perf_counter
    rows = []
    for stage in given.stages:
        for mode in ("32-true", "bf16-mixed", "bf16-true"):
            ours, theirs = fabric_loop(stage, mode, given.width), hand_loop(stage, mode, given.width)
            for _ in range(20):
                ours()
                theirs()
            result = interleave(ours, theirs, given.rounds, given.steps, clock=clock)
            cells = [f"{result.ours * 1e6:.0f}", f"{result.theirs * 1e6:.0f}", f"{result.ratio:.3f}"]
            quartiles = f"{result.low:.3f} to {result.high:.3f}"
            rows.append([str(stage), mode, *cells, quartiles, verdict(result.ratio, TARGET)])
    if torch.distributed.get_rank() == 0:
        head = ["stage", "mode", "us a step", "by hand", "ratio", "quartiles", "target"]
        what = f"DeepSpeed step, {torch.distributed.get_world_size()} ranks, {'CPU' if given.cpu else 'wall'} time"
        print_table(what, head, rows)


def start(width: int) -> tuple[nn.Module, AdamW, torch.Tensor, torch.Tensor]:
    """Returns a model, an optimizer and this rank's batch; the same ones at each call."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(BATCH, width), torch.randn(BATCH, width)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4)))
    return model, AdamW(model.parameters(), lr=1e-4), inputs, targets


def fabric_loop(stage: int, mode: str, width: int) -> Step:
    """Returns a step through Fabric."""
    from precision_deepspeed import DeepSpeedStrategy

    fabric = Fabric(accelerator="cpu", strategy=DeepSpeedStrategy(stage), precision=mode)
    model, optimizer, inputs, targets = start(width)
    fabric.setup(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()

    return step


def hand_loop(stage: int, mode: str, width: int) -> Step:
    """Returns a step with the engine alone, under the same config."""
    from precision_deepspeed import deepspeed_config
    from precision_deepspeed.vendor import initialize

    model, optimizer, inputs, targets = start(width)
    config = deepspeed_config(mode, {"zero_optimization": {"stage": stage}})
    engine = initialize(0, model=model, optimizer=optimizer, config=config)
    dtype = torch.bfloat16 if mode == "bf16-true" else torch.float32

    def step() -> None:
        loss = mse_loss(engine(inputs.to(dtype)).float(), targets)
        engine.backward(loss)
        engine.step()

    return step


if __name__ == "__main__":
    main()
