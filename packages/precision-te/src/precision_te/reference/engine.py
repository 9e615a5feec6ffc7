"""The reference as an engine of the plugin's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from precision_te.recipes import RECIPES, Recipe
from precision_te.reference.layers import ReferenceLinear
from precision_te.reference.recompute import Checkpointed
from precision_te.reference.region import region


class ReferenceEngine:
    """Plain torch on any device, slow: for what a model does in a format, not for speed. An `Engine`."""

    name = "reference"
    restorable: tuple[type[nn.Module], ...] = (ReferenceLinear,)

    def __init__(self) -> None:
        self._registered: list[ref[ReferenceLinear]] = []
        self.layers: Mapping[type[nn.Module], Callable[..., nn.Module]] = {nn.Linear: _make}

    def check(self, recipe: Recipe) -> None:
        """Raises `ValueError` for an unknown recipe; the known ones run on every machine."""
        if not isinstance(recipe, tuple(RECIPES.values())):
            raise ValueError(f"the reference runs {', '.join(RECIPES)}, and this is {recipe!r}")

    def why_not(self, layer: nn.Module, recipe: Recipe) -> str | None:
        """Returns why the vendor's kernels cannot take this layer: the same layers are converted as there."""
        assert isinstance(layer, nn.Linear)
        for name in ("in_features", "out_features"):
            size = getattr(layer, name)
            if size == 0 or size % recipe.multiple:
                return f"{name}={size} is no multiple of {recipe.multiple}, which {recipe.name} needs"
        return None

    def is_layer(self, module: nn.Module) -> bool:
        """Whether `module` is one of this engine's layers."""
        return isinstance(module, ReferenceLinear)

    def restore(self, layer: nn.Module) -> nn.Module:
        """Returns an `nn.Linear` with the very parameters of `layer`; delayed scaling's state is not in it."""
        assert isinstance(layer, ReferenceLinear)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = layer.weight
        plain.register_parameter("bias", layer.bias)
        del layer.amax, layer._last, layer._runs  # what is left on it is the user's, and moves to the new layer
        return plain.train(layer.training)

    def context(
        self, recipe: Recipe, *, group: dist.ProcessGroup | None = None, calibrating: bool = False
    ) -> AbstractContextManager[Any]:
        """Returns a new context in which the layers compute in `recipe`, to be entered inside the base mode's."""
        return region(recipe, group=group, calibrating=calibrating, layers=self._registered)

    def accumulation_context(self) -> AbstractContextManager[Any]:
        """Context that changes nothing: each forward quantises its weights."""
        return nullcontext()

    def register(self, module: nn.Module) -> None:
        """Adds the model's layers to those whose amax is reduced over ranks, in the order of setup.

        None is ever removed: the list must be the same on all ranks, and they garbage collect at different times.
        """
        known = {layer() for layer in self._registered}
        new = (layer for layer in module.modules() if isinstance(layer, ReferenceLinear) and layer not in known)
        self._registered.extend(map(ref, new))

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what torch's `checkpoint` does; a recomputed block uses the scales of its own first forward.

        Reentrant, each block has a backward of its own, which ends with an update of the gradients' scales.
        """
        return checkpoint(Checkpointed(function), *args, **{"use_reentrant": False} | kwargs)


def _make(layer: Any, *, recipe: Recipe, dtype: torch.dtype | None = None, name: str = "") -> ReferenceLinear:
    """Returns the layer with the very parameters of `layer`, cast to `dtype` where that is given."""
    for param in layer.parameters():
        if dtype is not None and param.dtype is not dtype:
            param.data = param.data.to(dtype)
    return ReferenceLinear(layer.weight, layer.bias).train(layer.training)
