"""On an alarm: which operation it was, by `precision_lab.explaining`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_core.override import uncompiled
from precision_lab.explaining.ranks import ANOTHER
from precision_lab.watching.alarms import GRADIENTS, SKIPS
from precision_lab.watching.batch import Batch, RandomState
from precision_lab.watching.kept import Kept

_ANOTHER = (
    "the gradients that this rank's own batch gives are finite: what is not came from another rank, with which they "
    "were averaged, or the sum over ranks overflowed. The files of the other ranks say which."
)
_LAST_BATCH = (
    "of several batches before one step only the last was run once more; or something has changed the gradients"
)
_OF_A_STEP_BEFORE = {"", "weights", "optimizer"}
"""Phases of explanations that an earlier step may have brought about; "" where nothing is wrong in this one."""
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}


def explained(
    kind: str,
    batch: Batch | None,
    scale: float,
    optimizer: Optimizer | None,
    ranks: int = 1,
    kept: Kept | None = None,
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
        else:
            found = _run(model, batch, scale, backward, optimizer)
        if kept is not None and (found is None or found.phase in _OF_A_STEP_BEFORE):
            found = _of_the_step_before(model, kept) or found
        if found is None:
            return None, parts.NOTE
        if kind == GRADIENTS and found.kind == "nothing":
            if ranks > 1:
                found.kind, found.what = ANOTHER, _ANOTHER
            else:
                found.notes.append(_LAST_BATCH)
        return found, ""
    except Exception as error:  # the loop is the user's: it goes on
        return None, f"the replay failed: {type(error).__name__}: {error}"
    finally:
        before.restore()


def _run(model: nn.Module, batch: Batch, scale: float, backward: bool, optimizer: Optimizer | None) -> Any:
    explain = importlib.import_module("precision_lab.explaining.explain").explain
    with torch.enable_grad():
        return explain(
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


def _of_the_step_before(model: nn.Module, kept: Kept) -> Any:
    """Returns what the last optimizer step did wrong; where its gradients were not finite, what made them so."""
    optimizers = importlib.import_module("precision_lab.explaining.optimizers")
    for each in kept.steps:
        found = optimizers.explain_step(each)
        if found is None:
            continue
        if found.kind == optimizers.GRADIENTS and kept.batch is not None and not _is_sharded(model):
            with _weights_of(kept):
                operation = _run(model, kept.batch, kept.scale, True, None)
            if operation.kind != "nothing":
                operation.what += f" So {found.what}"
                found = operation
        found.notes.append("it was in the step before, of which weights, gradients and the optimizer's state were kept")
        return found
    return None


@contextmanager
def _weights_of(kept: Kept) -> Iterator[None]:
    """Context in which the parameters are those from before the step. Graphs that wait for backward are not told."""
    params = [each for before in kept.steps for each in before.params]
    now = [each.live.data for each in params]
    try:
        for each in params:
            each.live.data = each.value
        yield
    finally:
        for each, value in zip(params, now, strict=True):
            each.live.data = value


def _is_sharded(model: nn.Module) -> bool:
    """Whether a forward or backward of it would talk to other ranks. Gathered weights of FSDP2 look like any others."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    marks = ("placements", "ds_id")  # of DTensors, and of DeepSpeed's stage 3
    return bool(kinds & _SHARDED) or any(hasattr(param, mark) for param in model.parameters() for mark in marks)
