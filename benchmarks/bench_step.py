"""Host time of a training step through Fabric beside the loop that a careful user writes by hand.

The model is an MLP so small that Python and dispatch take the time, not arithmetic: float16 products are slow on most
CPUs, and 8 x 32 values keep them out of the picture. Optimizer: AdamW as torch makes it on a CPU. One thread, garbage
collection off; steps of both loops alternate in one process. Shown is the median of the ratios pair by pair, with its
quartiles, over the half of the pairs that other work on the machine disturbed least. Both loops start from the same
weights and see the same batch, so they do the same arithmetic; that is checked before the clock starts.

Target: at most 1.03 times the hand-written loop; clipping under 16-mixed, which takes one pass over the gradients
instead of two, below 1.0. The true modes are for information.

`--peers` adds Lightning Fabric and Accelerate, where they are installed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from _loops import MAX_NORM, Step, fabric_loop, hand_loop, start
from _measure import interleave, print_table, verdict
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import mse_loss

WIDTH, BATCH = 32, 8
TARGET, TARGET_SCALED_CLIP = 1.03, 1.0

Build = Callable[[str, bool, int, int], tuple[nn.Module, Step]]


def main() -> None:
    options = argparse.ArgumentParser(description="Host time per step beside the hand-written loop.")
    options.add_argument("--rounds", type=int, default=3000, help="pairs of steps in each row")
    options.add_argument("--steps", type=int, default=1, help="steps in a block")
    options.add_argument("--peers", action="store_true", help="Lightning Fabric and Accelerate too, where installed")
    given, _ = options.parse_known_args()  # other benchmarks may be run with the same arguments
    torch.set_num_threads(1)
    loops: dict[str, Build] = {"Fabric": fabric_loop}
    if given.peers:
        loops |= peers()
    rows = []
    for mode in ("bf16-mixed", "16-mixed", "32-true", "bf16-true"):
        for clipped in (False, True):
            for name, build in loops.items():
                rows.append([mode, f"max_norm={MAX_NORM:g}" if clipped else "-", name])
                try:
                    rows[-1] += measure(build, mode, clipped, given.rounds, given.steps, name == "Fabric")
                except (ValueError, NotImplementedError, AssertionError) as error:
                    if name == "Fabric":
                        raise
                    rows[-1] += ["-", "-", "-", "-", str(error).splitlines()[0][:60]]
    head = ["mode", "clipping", "loop", "us a step", "by hand", "ratio", "quartiles", "target"]
    print_table("host time per step", head, rows)


def measure(build: Build, mode: str, clipped: bool, rounds: int, steps: int, ours: bool) -> list[str]:
    """Returns the cells of one row."""
    model, step = build(mode, clipped, WIDTH, BATCH)
    reference, hand_step = hand_loop(mode, clipped, WIDTH, BATCH)
    for _ in range(30):
        step()
        hand_step()
    for param, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(param, expected, msg="computes something else")
    result = interleave(step, hand_step, rounds, steps)
    strict = mode == "16-mixed" and clipped
    target = TARGET_SCALED_CLIP if strict else TARGET
    return [
        f"{result.ours * 1e6:.0f}",
        f"{result.theirs * 1e6:.0f}",
        f"{result.ratio:.3f}",
        f"{result.low:.3f} to {result.high:.3f}",
        verdict(result.ratio, target if ours and mode.endswith("mixed") else None, strict),
    ]


def peers() -> dict[str, Build]:
    """Returns the loops of the peers that are installed."""
    found: dict[str, Build] = {}
    try:
        import lightning_fabric

        found[f"lightning-fabric {lightning_fabric.__version__}"] = lightning_loop
    except ImportError:
        print("lightning-fabric is not installed")
    try:
        import accelerate

        found[f"accelerate {accelerate.__version__}"] = accelerate_loop
    except ImportError:
        print("accelerate is not installed")
    return found


def lightning_loop(mode: str, clipped: bool, width: int, batch: int) -> tuple[nn.Module, Step]:
    from lightning_fabric import Fabric as LightningFabric
    from lightning_fabric.plugins import MixedPrecision

    model, optimizer, inputs, targets = start(width, batch)
    if mode == "16-mixed":  # as a string it would run bfloat16 on a CPU
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=GradScaler("cpu"))
        fabric = LightningFabric(accelerator="cpu", devices=1, plugins=plugin)
    else:
        fabric = LightningFabric(accelerator="cpu", devices=1, precision=mode)
    model, optimizer = fabric.setup(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        fabric.backward(loss)
        if clipped:
            fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()

    return model, step


def accelerate_loop(mode: str, clipped: bool, width: int, batch: int) -> tuple[nn.Module, Step]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if mode == "bf16-true":
        raise NotImplementedError("has no such mode")
    AcceleratorState._reset_state(reset_partial_state=True)
    model, optimizer, inputs, targets = start(width, batch)
    kind = {"32-true": "no", "bf16-mixed": "bf16", "16-mixed": "fp16"}[mode]
    accelerator = Accelerator(cpu=True, mixed_precision=kind)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        if clipped:
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return model, step


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
