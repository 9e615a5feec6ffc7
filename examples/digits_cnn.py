"""A convolutional network on handwritten digits in 16-mixed: clipping, a scheduler, and exact resume within an epoch.

    python examples/digits_cnn.py --checkpoint digits.ckpt             # Ctrl-C it whenever you like
    python examples/digits_cnn.py --checkpoint digits.ckpt --resume    # goes on as if it had never stopped
    python examples/digits_cnn.py --tiny                               # seconds on one CPU core

Needs precision-core and scikit-learn, which ships the 1,797 images of 8 x 8 pixels; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from precision_core import Fabric

HELD_OUT = 360
"""Images at the end of the data, which training never sees."""


class CNN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),  # running statistics stay float32 in every mode
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(2 * width * 16, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def data() -> tuple[TensorDataset, TensorDataset]:
    """Returns the training and the held-out images (1, 8, 8), from 0 to 1, with their digits."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    return TensorDataset(images[:-HELD_OUT], labels[:-HELD_OUT]), TensorDataset(images[-HELD_OUT:], labels[-HELD_OUT:])


def shifted(images: Tensor) -> Tensor:
    """Moves the batch by up to one pixel; the numbers come from torch's generator, which a checkpoint keeps."""
    across, down = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(images, (down, across), dims=(2, 3))


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset, fabric: Fabric) -> float:
    images, labels = fabric.to_device(dataset.tensors)
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Train a CNN on digits.")
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--checkpoint", type=Path, default=Path("digits.ckpt"))
    parser.add_argument("--every", type=int, default=25, help="steps between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--stop-after", type=int, help="stop at this step, as a job does whose time is over")
    parser.add_argument("--tiny", action="store_true", help="a small network, two epochs")
    args = parser.parse_args(argv)
    if args.tiny:
        args.epochs, args.width, args.every, args.accelerator = 2, 8, 5, "cpu"

    fabric = Fabric(accelerator=args.accelerator, precision=args.precision)
    fabric.seed_everything(0)
    training, held_out = data()
    loader = fabric.setup_dataloaders(DataLoader(training, batch_size=64, shuffle=True))
    model = CNN(args.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    # Set up, the scheduler does not step where the optimizer did not because gradients overflowed in float16.
    scheduler = fabric.setup_schedulers(
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=args.epochs * len(loader) + 1)
    )
    # Loss scale and random generators are saved without being asked; the loader saves its place in the epoch.
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "epoch": 0, "step": 0}
    if args.resume:
        fabric.load(args.checkpoint, state)
        print(f"resumed at epoch {state['epoch']}, step {state['step']}")

    loss = torch.tensor(0.0)
    for epoch in range(state["epoch"], args.epochs):
        state["epoch"] = epoch
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(shifted(images)), labels)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)  # unscales first
            optimizer.step()
            scheduler.step()
            state["step"] += 1
            if state["step"] % args.every == 0:
                fabric.save(args.checkpoint, state)  # all or nothing: a crash here leaves the checkpoint before
            if state["step"] == args.stop_after:
                print(f"stopped at step {state['step']}, loss {loss.item():.4f}")
                return {"loss": loss.item(), "step": state["step"]}
        plugin = fabric.precision_plugin
        print(
            f"epoch {epoch + 1}: loss {loss.item():.4f}, held-out accuracy {accuracy(model, held_out, fabric):.3f}, "
            f"{plugin.skipped_steps} steps skipped, loss scale {plugin.scale:.0f}"
        )
    checksum = sum(param.double().sum().item() for param in model.parameters())
    return {"loss": loss.item(), "accuracy": accuracy(model, held_out, fabric), "checksum": checksum}


if __name__ == "__main__":
    main()
