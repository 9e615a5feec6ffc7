"""The layers that surgery is about: where they stand in the model, and why some of them are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from precision_core.policy.patterns import check_all_used, check_pattern, covers

Patterns = Iterable[str] | None

_IN_ATTENTION = "MultiheadAttention uses its weight without calling its forward"


@dataclass(frozen=True)
class Replacement:
    """How layers of one type are replaced."""

    make: Callable[[nn.Module], nn.Module]
    """Returns the new layer for an old one."""
    skip: Callable[[str, nn.Module], str | None] = lambda name, layer: None
    """Returns for (name, layer) the reason to leave it alone, a shape that FP8 cannot take for example, or None."""
    packs: bool = False
    """The new layer stores its weights in another shape or dtype: they cannot stand in for the old ones elsewhere."""
    keeps: Callable[[nn.Module, nn.Parameter], bool] = lambda layer, param: False
    """Whether the new layer has this very parameter of the old one, so that its gradient and hooks stay."""
    takes: frozenset[str] = frozenset({"weight", "bias"})
    """The parameters, buffers and children that `make` takes over; a layer with others is refused."""


class Place(NamedTuple):
    """One name of a module, and where it stands: `parents[-1]._modules[key]`."""

    name: str
    key: str
    parents: tuple[nn.Module, ...]


@dataclass
class Layer:
    """A module of a type that the table names, or of a subclass, with all its places."""

    module: nn.Module
    kind: type[nn.Module]  # its type, or the nearest one above that the table names
    replacement: Replacement
    places: list[Place] = field(default_factory=list)
    reason: str | None = None  # why it is left alone

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def converts(self) -> bool:
        return self.reason is None


def find_layers(
    root: nn.Module, top: nn.Module, table: Mapping[type[nn.Module], Replacement], include: Patterns, exclude: Patterns
) -> list[Layer]:
    """Returns, in definition order, the layers of the types in `table` and of types derived from them.

    `top` is a module that holds `root` as its one child. Raises `ValueError` for a pattern that matches no module.
    """
    included, excluded = _patterns(include), _patterns(exclude) or ()
    names = [name for name, _ in root.named_modules(remove_duplicate=False)]
    check_all_used((*(included or ()), *excluded), names, "module")
    layers = _find(top, table)
    for layer in layers:
        layer.reason = _outside(layer, included, excluded) or _unfit(layer)
    chosen = {layer.module: layer.name for layer in layers if layer.converts}
    for layer in layers:
        around = [chosen[parent] for place in layer.places for parent in place.parents if parent in chosen]
        if layer.converts and around:
            layer.reason = f"part of {shown(around[0])}"
    return layers


def shown(name: str) -> str:
    """Returns `name`, or what stands for the root's empty one in a report."""
    return name or "(root)"


def _patterns(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return tuple(check_pattern(pattern) for pattern in ((patterns,) if isinstance(patterns, str) else patterns))


def _find(top: nn.Module, table: Mapping[type[nn.Module], Replacement]) -> list[Layer]:
    found: dict[nn.Module, Layer] = {}
    for module, place in _walk(top, "", ()):
        kind = next((kind for kind in type(module).__mro__ if kind in table), None)
        if kind is not None:
            found.setdefault(module, Layer(module, kind, table[kind])).places.append(place)
    return list(found.values())


def _walk(parent: nn.Module, prefix: str, parents: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, Place]]:
    parents = (*parents, parent)
    for key, child in parent._modules.items():
        if child is not None:
            name = f"{prefix}.{key}" if prefix else key
            yield child, Place(name, key, parents)
            yield from _walk(child, name, parents)


def _outside(layer: Layer, include: tuple[str, ...] | None, exclude: tuple[str, ...]) -> str | None:
    for place in layer.places:
        pattern = next((pattern for pattern in exclude if covers(pattern, place.name)), None)
        if pattern is not None:
            reason = f"excluded by {pattern!r}"
        elif include is not None and not any(covers(pattern, place.name) for pattern in include):
            reason = "not included"
        else:
            continue
        return reason if place is layer.places[0] else f"the same module as {place.name}, which is {reason}"
    return None


def _unfit(layer: Layer) -> str | None:
    module = layer.module
    in_attention = any(
        place.key == "out_proj" and isinstance(place.parents[-1], nn.MultiheadAttention) for place in layer.places
    )
    # Parametrising a module gives it a class of its own, derived from the one it had.
    kind = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    if kind is not layer.kind:
        return f"a subclass of {layer.kind.__name__}: {kind.__name__}" + (f"; {_IN_ATTENTION}" if in_attention else "")
    if in_attention:
        return _IN_ATTENTION
    if module._compiled_call_impl is not None:
        return "compiled already: convert the model before layer.compile()"
    own = next((key for key in vars(module) if callable(getattr(type(module), key, None))), None)
    if own is not None:
        return f"its own {own} would be lost"
    return layer.replacement.skip(layer.name, module)
