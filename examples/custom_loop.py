"""A loop of your own, without Fabric: a plugin's hooks beside plain torch.

    python examples/custom_loop.py                           # 16-mixed
    python examples/custom_loop.py --precision bf16-true
    python examples/custom_loop.py --tiny                    # seconds on one CPU core

Needs precision-core and scikit-learn, which ships the data: 1,797 images of handwritten digits.

For projects that have their own trainer: a plugin knows no device, no process group and no file. It casts, scales,
clips and steps; you move tensors, wrap models (DDP, fully_shard) and save.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from precision_core import DoublePrecision, HalfPrecision, MixedPrecision, Precision


def plugin(mode: str, device: str) -> Precision:
    """Returns the plugin of a mode. Fabric does it by name, which also finds those of other packages."""
    if mode == "64-true":
        return DoublePrecision()
    if mode.endswith("-mixed"):
        return MixedPrecision(mode, device=device, scaler={"init_scale": 2.0**12} if mode == "16-mixed" else None)
    return Precision() if mode == "32-true" else HalfPrecision(mode)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Train with a precision plugin and no host.")
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--accumulate", type=int, default=2, help="batches for one step")
    parser.add_argument("--checkpoint", type=Path, help="saved after each epoch; goes on from it where it exists")
    parser.add_argument("--tiny", action="store_true", help="a small model, four epochs, on the CPU")
    args = parser.parse_args(argv)
    if args.tiny:
        args.epochs, args.width, args.device = 4, 64, "cpu"

    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32, device=args.device) / 16
    labels = torch.tensor(digits, device=args.device)

    precision = plugin(args.precision, args.device)
    model = nn.Sequential(nn.Linear(64, args.width), nn.LayerNorm(args.width), nn.GELU(), nn.Linear(args.width, 10))
    model = precision.convert_module(model).to(args.device)  # casts what the mode says, or says what it cannot train
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)  # 1e-8 would be 0 in 16-true
    precision.register_optimizers(optimizer)  # with several: all of them, so that one scale serves all
    start = 0
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        precision.load_state_dict(saved["precision"])  # loss scale, counted steps
        start = saved["epoch"]

    for epoch in range(start, args.epochs):
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(epoch)).to(args.device)
        for step in order.split(50 * args.accumulate):
            optimizer.zero_grad()
            parts = step.chunk(args.accumulate)
            for index in parts:
                with precision.forward_context():
                    output = model(precision.convert_input(images[index]))
                loss = F.cross_entropy(precision.convert_output(output), labels[index]) / len(parts)
                precision.pre_backward(loss, model).backward()
            norm = precision.clip_gradients(model, optimizer, max_norm=1.0)  # the norm of unscaled gradients
            precision.optimizer_step(optimizer, model, None)
        if args.checkpoint:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state | {"precision": precision.state_dict()}, args.checkpoint)
        print(
            f"epoch {epoch + 1}: loss {loss.item() * len(parts):.4f}, norm {norm.item():.3f}, "
            f"{precision.skipped_steps} steps skipped, loss scale {precision.scale:.0f}"
        )
    with torch.no_grad(), precision.forward_context():
        output = precision.convert_output(model(precision.convert_input(images[1500:])))
    accuracy = (output.argmax(1) == labels[1500:]).float().mean().item()
    print(f"held-out accuracy {accuracy:.3f} in {args.precision}")
    checksum = sum(param.double().sum().item() for param in model.parameters())
    return {"accuracy": accuracy, "checksum": checksum, "scale": precision.scale}


if __name__ == "__main__":
    main()
