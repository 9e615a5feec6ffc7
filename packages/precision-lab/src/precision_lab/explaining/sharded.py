"""What one rank sees of a sharded model by itself: its batch, its shards, and what the graph of the loss has kept.

The forward is not run once more: it gathers weights, and would wait for ranks for which nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.loss import explain_loss
from precision_lab.explaining.numbers import is_finite, tensors
from precision_lab.explaining.remedies import BATCHES, WEIGHTS
from precision_lab.explaining.replay import Step
from precision_lab.explaining.stored import explain_leaf, masks_of

NOTE = "the model is sharded: nothing was run once more, as a forward on one rank alone would wait for the others"


def explain_sharded(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Tensor | None
) -> Explanation | None:
    """Returns what is not finite of what this rank holds, or in the graph of its loss; None where that says nothing."""
    step = Step(model, args, dict(kwargs), lambda: None)  # type: ignore[arg-type, return-value]  # nothing is run
    masks = masks_of(step)
    found: Explanation | None = None
    for name, value in [*((f"input {number}", each) for number, each in enumerate(args)), *_named(kwargs)]:
        if name not in masks and not all(map(is_finite, tensors(value))):
            found = explain_leaf(step, name)
            found.remedies = [Remedy("data", BATCHES, BATCHES)]
            break
    if found is None:
        bad = next((name for name, each in model.named_parameters() if not is_finite(each)), None)
        if bad is not None:
            found = explain_leaf(step, f"parameter {bad}")
            found.remedies = [Remedy("weights", WEIGHTS, WEIGHTS)]
    if found is None and loss is not None:
        found = explain_loss(loss, [])
        if found is not None and not found.operation:
            found = None
    if found is not None:
        found.model = type(model).__name__
        found.notes.append(NOTE)
    return found


def _named(kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"input {key}", each) for key, each in kwargs.items()]
