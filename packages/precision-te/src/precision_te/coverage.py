"""Coverage: how many of a model's linear layers an engine computes, and which are small, for the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from precision_core.policy import listed
from precision_te.engine import Engine
from precision_te.recipes import Recipe

SMALL = 1024 * 1024
"""Weights of a linear layer below which a report names it: quantising its inputs may cost what the products save."""


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` multiplies by a matrix of its own, as far as its attributes tell; transformers' Conv1D does."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    kinds = " ".join(kind.__name__ for kind in type(layer).__mro__).lower()
    return hasattr(layer, "in_features") or (
        "weight" in layer._parameters and not ("embed" in kinds or "norm" in kinds)
    )


def small_layers(module: nn.Module, engine: Engine) -> list[str]:
    """Returns the names of the engine's linear layers whose weights are fewer than `SMALL`."""
    layers: list[tuple[str, Any]] = [(name, layer) for name, layer in module.named_modules() if is_linear(layer)]
    return [name for name, layer in layers if engine.is_layer(layer) and layer.weight.numel() < SMALL]


def notes(module: nn.Module, engine: Engine, recipe: Recipe, there: int) -> Iterator[str]:
    """Yields the report's notes; `there` layers were the engine's before."""
    layers = [layer for layer in module.modules() if is_linear(layer)]
    ours = sum(engine.is_layer(layer) for layer in layers)
    yield f'{ours} of {len(layers)} linear layers compute in recipe "{recipe.name}"'
    if there:
        yield f"{there} layers were the engine's before, and were taken as they are"
    if engine.name == "reference":
        yield "the reference has linear layers alone; norms stay torch's"
    if small := small_layers(module, engine):
        yield f"fewer than 2**20 weights, perhaps too small to win: {listed(small)}"
