"""On an alarm: which operation it was, by `precision_lab.explaining`, where that is there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch.optim import Optimizer

from precision_core.override import uncompiled
from precision_lab.watching.alarms import GRADIENTS, SKIPS
from precision_lab.watching.batch import Batch, RandomState


def explained(kind: str, batch: Batch | None, scale: float, optimizer: Optimizer | None) -> tuple[Any, str]:
    """Returns what `explaining.explain` found, or None and why there is nothing. Random states are as they were."""
    if importlib.util.find_spec("precision_lab.explaining") is None:
        return None, "precision_lab.explaining is not installed"
    if batch is None:
        return None, "no forward of the model was seen: is it called by another name than model(...)?"
    backward = kind in (GRADIENTS, SKIPS)
    if backward and not any(gradient is not None for gradient in batch.gradients):
        size = " (it is larger than 64 MiB)" if batch.too_large else ""
        return None, f"the gradient of the model's output was not kept{size}, so that backward cannot be run again"
    model = uncompiled(batch.model)
    if any(hasattr(param, "placements") for param in model.parameters()):
        return None, "the model is sharded: a forward on one rank alone would wait for the others"
    before = RandomState(batch.random.device)
    try:
        explain = importlib.import_module("precision_lab.explaining.explain").explain
        with torch.enable_grad():
            found = explain(
                model,
                batch.args,
                batch.kwargs,
                loss=None if backward else batch.loss,
                output_gradients=batch.gradients if backward else None,
                scale=scale,
                optimizer=optimizer,
                context=batch.context,
                rng_state=batch.random.as_dict(),
            )
        return found, ""
    except Exception as error:  # the loop is the user's: it goes on
        return None, f"the replay failed: {type(error).__name__}: {error}"
    finally:
        before.restore()
