"""Would my model train in FP8, MXFP8 or NVFP4? Asked of a reference in plain torch, before there is a GPU for it.

    python examples/fp8_reference.py                                         # minutes on a CPU
    python examples/fp8_reference.py --modes bf16-mixed nvfp4-reference --seeds 5
    python examples/fp8_reference.py --tiny                                  # seconds

Needs precision-core, precision-te (its reference alone: no Transformer Engine) and scikit-learn, which ships the data,
1,797 images of handwritten digits. For your own model, replace `model` and `data`.

The reference quantises operands as NVIDIA Transformer Engine's recipes do and multiplies in float32: the arithmetic,
not the speed. One run says little: a format is judged by its distance from bf16-mixed beside the spread over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from precision_core import Fabric

TRAINING = 1400
MODES = ["bf16-mixed", "fp8-reference", "fp8-current-reference", "mxfp8-reference", "nvfp4-reference"]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def model(width: int, layers: int) -> nn.Module:
    """Linear layers whose sizes are multiples of 32 are converted; the head has 10 outputs, stays, and is reported."""
    return nn.Sequential(nn.Linear(64, width), *(Residual(width) for _ in range(layers)), nn.Linear(width, 10))


def data() -> tuple[Tensor, Tensor]:
    pixels, digits = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(digits)


def train(mode: str, seed: int, args: argparse.Namespace) -> tuple[float, str]:
    """Returns the held-out loss, and how many layers and weights were converted."""
    fabric = Fabric(args.accelerator, precision=mode)
    fabric.seed_everything(seed)
    images, labels = fabric.to_device(data())
    net = model(args.width, args.layers)
    # A gradient that were off by a factor would not show under Adam, which divides by its size: SGD.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net, optimizer = fabric.setup(net, optimizer)
    for step in range(args.steps):
        index = torch.randint(TRAINING, (64,), device=fabric.device)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / args.steps)
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(net(images[index]), labels[index]))
        fabric.clip_gradients(net, optimizer, max_norm=1.0)
        optimizer.step()
    net.eval()
    with torch.no_grad():
        loss = F.cross_entropy(net(images[TRAINING:]), labels[TRAINING:]).item()
    return loss, str(fabric.precision_plugin.report).splitlines()[1].strip()


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description="Train in narrow formats by a reference, beside bf16-mixed.")
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="a small model, three modes, short runs, on the CPU")
    args = parser.parse_args(argv)
    if args.tiny:
        args.modes, args.seeds, args.steps = ["bf16-mixed", "fp8-reference", "nvfp4-reference"], 2, 30
        args.width, args.layers, args.accelerator = 32, 1, "cpu"

    results: dict[str, tuple[float, float]] = {}
    for mode in args.modes:
        runs = [train(mode, seed, args) for seed in range(args.seeds)]
        losses = [loss for loss, _ in runs]
        results[mode] = statistics.fmean(losses), max(losses) - min(losses)
        if mode == args.modes[0]:
            print(f"{'mode':<22} held-out loss, over {args.seeds} seeds  difference from {mode}")
        mean, spread = results[mode]
        print(f"{mode:<22} {mean:.4f}, apart by {spread:.4f}        {mean - results[args.modes[0]][0]:+.4f}")
        print(f"{'':<22} {runs[0][1]}")
    return results


if __name__ == "__main__":
    main()
