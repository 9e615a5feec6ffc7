"""On an alarm: which operation it was, by `precision_lab.explaining`, where that is there."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch.distributed.tensor import DTensor

from precision_core.override import uncompiled
from precision_lab.watching.batch import Batch, RandomState


def explained(batch: Batch | None) -> tuple[Any, str]:
    """Returns what `explaining.explain` found, or None and why there is nothing. Random states are as they were."""
    if importlib.util.find_spec("precision_lab.explaining") is None:
        return None, "precision_lab.explaining is not installed"
    if batch is None:
        return None, "no forward of the model was seen: is it called by another name than model(...)?"
    model = uncompiled(batch.model)
    if any(isinstance(param, DTensor) for param in model.parameters()):
        return None, "the model is sharded: a forward on one rank alone would wait for the others"
    before = RandomState(batch.random.device)
    try:
        from precision_lab.explaining.explain import explain

        return explain(model, batch.args, batch.kwargs, batch.random.cpu, batch.gradients or None, batch.context), ""
    except Exception as error:  # the loop is the user's: it goes on
        return None, f"the replay failed: {type(error).__name__}: {error}"
    finally:
        before.restore()
