"""`precision_lab.watch`: what it takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from precision_lab.watching.alarms import Alarm
from precision_lab.watching.boards import Board, TensorBoard, WeightsAndBiases
from precision_lab.watching.output import Output
from precision_lab.watching.watch import Watch


def watch(
    *watched: nn.Module | Optimizer,
    every: int = 50,
    file: str | os.PathLike[str] = "run.jsonl",
    on_alarm: Callable[[Alarm], object] | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    wandb: Any = None,
    keep: bool = False,
) -> Watch:
    """Context around a training loop of any library, which it watches at next to no cost.

    Each step's loss, norm of gradients (where the loop clips), loss scale and skips are written to `file`, one JSON
    object a line; every so many steps what each module gives and gets back. A loss or norm that is inf or NaN, a loss
    that jumps, and ten skipped steps in a row are alarms: logged, written with the operation that went wrong, and in
    `.alarms`. The loop computes what it computes without it, bit for bit.

    Args:
        watched: models and optimizers, as the loop uses them. Optimizers of the models' parameters are found by
            themselves; those of an engine, and ours, are to be given.
        every: each so many-th step is sampled.
        file: lines are added where it is there. Under DDP rank zero writes it; alarms of other ranks have their own.
        on_alarm: called with each alarm. What it raises ends the loop.
        tensorboard: a folder for the same values, by torch's SummaryWriter.
        wandb: True for the open run of Weights & Biases, or a run.
        keep: copies weights, gradients and the optimizer's state before each step, and reads losses before it: what an
            optimizer makes of finite gradients is named then, too. `.kept_bytes` says how much that is.

    Raises:
        TypeError: something else was given.
        ValueError: no model was given, or `every` is below 1.
        ImportError: tensorboard or wandb is not installed.
        RuntimeError: on entry, another watch runs.
    """
    models: list[nn.Module] = []
    optimizers: list[Optimizer] = []
    for each in watched:
        if isinstance(each, Optimizer):
            optimizers.append(each)
        elif isinstance(each, nn.Module):
            # Inside of DDP: a replay on one rank must not wait for the others.
            models.append(each.module if isinstance(each, DistributedDataParallel) else each)
        else:
            raise TypeError(f"watch(...): expected models and optimizers of torch, got {type(each).__name__}")
    if not models:
        raise ValueError("watch(...): give the model, too: watch(model, optimizer)")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"watch(every={every!r}): expected a whole number from 1 on")
    boards: list[Board] = []
    if tensorboard is not None:
        boards.append(TensorBoard(os.fspath(tensorboard)))
    if wandb not in (None, False):
        boards.append(WeightsAndBiases(wandb))
    return Watch(models, optimizers, every, lambda: Output(file, boards, on_alarm), keep)
