"""The same small training loop twice: through Fabric, and by hand as a careful user writes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from precision_core import Fabric

MAX_NORM = 1.0
DTYPES = {
    "64-true": torch.float64,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}

Step = Callable[[], None]


def start(width: int, batch: int) -> tuple[nn.Module, AdamW, Tensor, Tensor]:
    """Returns a model, AdamW as torch makes it on a CPU, and a batch; the same ones at each call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    inputs, targets = torch.randn(batch, width), torch.randn(batch, width)
    return model, AdamW(model.parameters(), lr=1e-4), inputs, targets


def fabric_loop(mode: str, clipped: bool, width: int, batch: int) -> tuple[nn.Module, Step]:
    """Returns the model and a step through Fabric."""
    model, optimizer, inputs, targets = start(width, batch)
    fabric = Fabric(accelerator="cpu", precision=mode)
    model, optimizer = fabric.setup(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        fabric.backward(loss)
        if clipped:
            fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()

    return model, step


def hand_loop(mode: str, clipped: bool, width: int, batch: int) -> tuple[nn.Module, Step]:
    """Returns the model and a step in plain PyTorch."""
    model, optimizer, inputs, targets = start(width, batch)
    dtype = DTYPES.get(mode)

    def scaled() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = mse_loss(model(inputs), targets)
        scaler.scale(loss).backward()
        if clipped:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    def mixed() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = mse_loss(model(inputs), targets)
        loss.backward()
        if clipped:
            clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    def true() -> None:
        optimizer.zero_grad()
        if half:
            loss = mse_loss(model(inputs.to(dtype)).float(), targets)
        else:
            loss = mse_loss(model(inputs if dtype is None else inputs.to(dtype)), targets)
        loss.backward()
        if clipped:
            clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    if mode == "16-mixed":
        scaler = GradScaler("cpu")
        return model, scaled
    if mode == "bf16-mixed":
        return model, mixed
    half = mode in ("16-true", "bf16-true")
    return model.to(dtype), true
