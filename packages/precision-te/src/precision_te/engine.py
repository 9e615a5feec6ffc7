"""Engine: who computes the low-precision products. `te` is NVIDIA's library, `reference` is plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from precision_te.recipes import Recipe


class Engine(Protocol):
    """What the plugin and the conversion need; none is ever swapped for another silently."""

    name: str
    """ "te" or "reference"."""

    @property
    def layers(self) -> Mapping[type[nn.Module], Callable[..., nn.Module]]:
        """torch's type of layer -> `make(layer, *, recipe, dtype, name)`: the engine's layer with the same parameters.

        The new layer holds the same `Parameter` objects. `dtype` is that of new tensors, None keeps the layer's;
        `name` is the layer's dotted name, for messages.
        """
        ...

    def check(self, recipe: Recipe) -> None:
        """Raises `ValueError` with the reason where this engine, or this machine, cannot run `recipe`.

        Raises `ImportError` with what to install where the engine's library is missing.
        """
        ...

    def why_not(self, layer: nn.Module, recipe: Recipe) -> str | None:
        """Returns why `recipe` cannot take this layer, its shape for example; the report says it. None: it can."""
        ...

    def is_layer(self, module: nn.Module) -> bool:
        """Whether `module` is one of the engine's layers, converted by us or built by the user."""
        ...

    @property
    def restorable(self) -> tuple[type[nn.Module], ...]:
        """The exact types that `restore` takes."""
        ...

    def restore(self, layer: nn.Module) -> nn.Module:
        """Returns torch's layer for one of the engine's, with the same parameters, or with equal values."""
        ...

    def context(
        self, recipe: Recipe, *, group: dist.ProcessGroup | None = None, calibrating: bool = False
    ) -> AbstractContextManager[Any]:
        """Returns a new context in which the engine's layers compute in `recipe`, to be entered inside the base mode's.

        `group`: the ranks over which delayed scaling reduces amax; None is this process alone. `calibrating`:
        statistics are collected, products stay in the base mode's dtype.
        """
        ...

    def accumulation_context(self) -> AbstractContextManager[Any]:
        """Returns a context of microbatches after which another one comes before the optimizer steps."""
        ...

    def register(self, module: nn.Module) -> None:
        """Called with each model that is set up, in the same order on all ranks."""
        ...

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns `function(*args, **kwargs)`; its activations are recomputed in backward, with the same scales."""
        ...
