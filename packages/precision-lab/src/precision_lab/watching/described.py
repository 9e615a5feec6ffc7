"""The first and the last line of a file: what runs, and how it ended."""

from __future__ import annotations

import itertools
import os
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_lab.auditing.ledger import short
from precision_lab.auditing.sample import local

_JOB = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")
"""What launchers set alike on all ranks of a job."""
_numbers = itertools.count(1)


def described(
    models: list[nn.Module], optimizers: list[Optimizer], every: int, rank: int, world: int
) -> dict[str, Any]:
    """Returns the run as plain values. `run` is the same on all ranks, which enter the same watches in order."""
    params = {id(param): param for model in models for param in model.parameters()}
    sizes: dict[str, int] = {}
    for param in params.values():
        sizes[short(param.dtype)] = sizes.get(short(param.dtype), 0) + local(param).numel()
    return {
        "watch": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "torch": str(torch.__version__),
        "precision_lab": version("precision-lab"),
        "models": [type(model).__name__ for model in models],
        "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
        "modules": sum(1 for model in models for _ in model.modules()),
        "parameters": sizes,
        "trained": sum(local(param).numel() for param in params.values() if param.requires_grad),
        "devices": sorted({str(param.device) for param in params.values()}),
        "every": every,
        "run": "/".join([*(os.environ.get(name, "") for name in _JOB), str(next(_numbers))]),
        "rank": rank,
        "ranks": world,
    }


def ended(error: BaseException | None) -> dict[str, Any]:
    """Returns with what the loop ended, for the last line."""
    return {"error": f"{type(error).__name__}: {error}" if error is not None else None}


def unseen_of(steps: int, forwards: int, models: list[nn.Module]) -> list[str]:
    """Returns what a whole run did not show, as sentences."""
    found = []
    if not steps:
        found.append("no step of an optimizer of the model was seen: give the optimizer that the loop steps")
    if not forwards:
        name = type(models[0]).__name__
        found.append(f"no training forward of {name} was seen: give what the loop calls (torch.compile's result, say)")
    return found
