"""A GAN in 16-mixed: two models, two optimizers, one loss scale.

    python examples/gan.py              # a few minutes on a CPU
    python examples/gan.py --tiny       # seconds

Needs precision-core and scikit-learn, whose images of handwritten digits (8 x 8 pixels) it learns to draw.

A scaler that is updated after each optimizer's step forgets what it knew of the other one: gradients that were clipped
before are divided by the scale twice. Here the scale belongs to the round, however many optimizers step in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from precision_core import Fabric

NOISE = 16


def generator(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, 64), nn.Sigmoid(),
    )  # fmt: skip


def critic(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Dropout(0.2),
        nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Dropout(0.2),
        nn.Linear(width, 1),
    )  # fmt: skip


def verdict(logits: Tensor, real: bool) -> Tensor:
    """Loss of the critic's logits where all are real, or none. From logits: a sigmoid would round to 1 in float16."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


@torch.no_grad()
def examine(model: nn.Module, images: Tensor, labels: Tensor, fabric: Fabric) -> tuple[float, int]:
    """Returns the mean distance of 500 drawn images to the nearest real one, and how many digits are among those."""
    noise = torch.randn(500, NOISE, generator=torch.Generator().manual_seed(1)).to(fabric.device)
    model.eval()
    distance, nearest = torch.cdist(model(noise), images).min(dim=1)
    model.train()
    counts = torch.bincount(labels[nearest], minlength=10)
    return distance.mean().item(), int((counts >= 5).sum())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Train a GAN on digits.")
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="small models, few epochs, on the CPU")
    args = parser.parse_args(argv)
    if args.tiny:
        args.epochs, args.width, args.accelerator = 8, 48, "cpu"

    fabric = Fabric(accelerator=args.accelerator, precision=args.precision)
    fabric.seed_everything(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = fabric.to_device((torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)))
    loader = DataLoader(images, batch_size=64, shuffle=True, drop_last=True)

    draw, judge = generator(args.width), critic(args.width)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.99)) for model in (draw, judge)]
    draw, draw_optimizer = fabric.setup(draw, optimizers[0])
    judge, judge_optimizer = fabric.setup(judge, optimizers[1])
    before, _ = examine(draw, images, labels, fabric)

    for epoch in range(args.epochs):
        for real in loader:
            fake = draw(torch.randn(len(real), NOISE, device=fabric.device))

            judge_optimizer.zero_grad()
            judge_loss = verdict(judge(real), True) + verdict(judge(fake.detach()), False)
            fabric.backward(judge_loss)
            fabric.clip_gradients(judge, judge_optimizer, max_norm=1.0)
            judge_optimizer.step()

            draw_optimizer.zero_grad()
            draw_loss = verdict(judge(fake), True)
            fabric.backward(draw_loss)  # reaches the critic's parameters too, whose next zero_grad drops that
            fabric.clip_gradients(draw, draw_optimizer, max_norm=1.0)
            draw_optimizer.step()
        if (epoch + 1) % (args.epochs // 4) == 0:
            distance, found = examine(draw, images, labels, fabric)
            losses = f"critic {judge_loss.item():.3f}, generator {draw_loss.item():.3f}"
            print(f"epoch {epoch + 1}: {losses}; {distance:.3f} from the nearest real image, {found} of 10 digits")
    plugin = fabric.precision_plugin
    print(f"untrained: {before:.3f}; {plugin.steps} steps, {plugin.skipped_steps} skipped, scale {plugin.scale:.0f}")
    return {"before": before, "after": distance, "digits": found, "steps": plugin.steps + plugin.skipped_steps}


if __name__ == "__main__":
    main()
