"""On an alarm: which operation it was, by `precision_lab.explaining`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_core.override import uncompiled
from precision_lab.explaining.ranks import ANOTHER
from precision_lab.watching.alarms import GRADIENTS, SKIPS
from precision_lab.watching.batch import Batch, RandomState

_ANOTHER = (
    "the gradients that this rank's own batch gives are finite: what is not came from another rank, with which they "
    "were averaged, or the sum over ranks overflowed. The files of the other ranks say which."
)
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


def explained(
    kind: str, batch: Batch | None, scale: float, optimizer: Optimizer | None, ranks: int = 1
) -> tuple[Any, str]:
    """Returns what `explaining.explain` found, or None and why there is nothing. Random states are as they were."""
    if batch is None:
        return None, "no forward of the model was seen: is it called by another name than model(...)?"
    backward = kind in (GRADIENTS, SKIPS)
    if backward and not any(gradient is not None for gradient in batch.gradients):
        size = " (it is larger than 64 MiB)" if batch.too_large else ""
        return None, f"the gradient of the model's output was not kept{size}, so that backward cannot be run again"
    model = uncompiled(batch.model)
    before = RandomState(batch.random.device)
    try:
        if _is_sharded(model):
            parts = importlib.import_module("precision_lab.explaining.sharded")
            found = parts.explain_sharded(model, batch.args, batch.kwargs, batch.loss)
            return found, "" if found is not None else parts.NOTE
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
        if kind == GRADIENTS and found.kind == "nothing" and ranks > 1:
            found.kind, found.what = ANOTHER, _ANOTHER
        return found, ""
    except Exception as error:  # the loop is the user's: it goes on
        return None, f"the replay failed: {type(error).__name__}: {error}"
    finally:
        before.restore()


def _is_sharded(model: nn.Module) -> bool:
    """Whether a forward or backward of it would talk to other ranks. Gathered weights of FSDP2 look like any others."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return bool(kinds & _SHARDED) or any(hasattr(param, "placements") for param in model.parameters())
