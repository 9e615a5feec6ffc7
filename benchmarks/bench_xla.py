"""Time of a step on an XLA device through Fabric beside a torch_xla loop written by hand, in the same process.

Both loops end each step with a sync and wait for the device, in turn; CPU time of all threads. Shown is the median of
the ratios pair by pair, over the quieter half of the pairs. Without torch_xla this says so and ends.

Target: at most 1.02 times the hand-written loop.
"""

from __future__ import annotations

import argparse
import importlib.util
from contextlib import nullcontext

import torch
from _measure import Step, interleave, keep_freed_memory, print_table, verdict
from torch import nn
from torch.nn.functional import mse_loss

from precision_core import MODES, Fabric

WIDTH, BATCH, LAYERS = 256, 64, 4
TARGET = 1.02
NAMES = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")


def main() -> None:
    options = argparse.ArgumentParser(description="A step on an XLA device beside the hand-written loop.")
    options.add_argument("--rounds", type=int, default=200, help="pairs of blocks in each row")
    options.add_argument("--steps", type=int, default=1, help="steps in a block")
    options.add_argument("--modes", nargs="*", default=NAMES)
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    if importlib.util.find_spec("torch_xla") is None:
        print("bench_xla.py: torch_xla is not installed here; packages/precision-xla has an environment of its own")
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for mode in given.modes:
        ours, theirs = fabric_loop(mode), hand_loop(mode)
        for _ in range(10):
            ours()
            theirs()
        result = interleave(ours, theirs, given.rounds, given.steps)
        cells = [f"{result.ours * 1e6:.0f}", f"{result.theirs * 1e6:.0f}", f"{result.ratio:.3f}"]
        rows.append([mode, *cells, f"{result.low:.3f} to {result.high:.3f}", verdict(result.ratio, TARGET)])
    print_table("XLA step", ["mode", "us a step", "by hand", "ratio", "quartiles", "target"], rows)


def start() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Returns a model and a batch; the same ones at each call."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)))
    return model, torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)


def make_optimizer(mode: str, model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW; under a scaled loss the vendor's, which skips on the device."""
    if mode != "16-mixed":
        return torch.optim.AdamW(model.parameters(), lr=1e-4)
    from torch_xla.amp import syncfree

    return syncfree.AdamW(model.parameters(), lr=1e-4)


def fabric_loop(mode: str) -> Step:
    """Returns a step through Fabric."""
    import torch_xla.core.xla_model as xm

    fabric = Fabric(accelerator="cpu", strategy="xla", precision=mode)
    model, inputs, targets = start()
    model, optimizer = fabric.setup(model, make_optimizer(mode, model))
    inputs, targets = inputs.to(fabric.device), targets.to(fabric.device)

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()
        xm.wait_device_ops()

    return step


def hand_loop(mode: str) -> Step:
    """Returns a step as torch_xla's documents write it."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    policy, device = MODES[mode], torch_xla.device()
    model, inputs, targets = start()
    model = model.to(device, policy.params)
    optimizer = make_optimizer(mode, model)
    inputs, targets = inputs.to(device), targets.to(device)
    scaler = torch.amp.GradScaler("xla", enabled=policy.scale)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("xla", dtype=policy.compute) if policy.mixed else nullcontext():
            output = model(inputs.to(policy.params))
        loss = mse_loss(output.float(), targets)
        if policy.scale:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            found = sum(scaler._found_inf_per_device(optimizer).values())
            optimizer.step(found_inf=found)  # type: ignore[call-arg]
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        torch_xla.sync()
        xm.wait_device_ops()

    return step


if __name__ == "__main__":
    main()
