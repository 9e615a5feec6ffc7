"""The layers that surgery may replace: their positions in the model, and why some are skipped."""

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
    """How layers of one type are replaced: `make` is required, the rest has defaults."""

    make: Callable[[nn.Module], nn.Module]
    """Returns the new layer for an old one."""
    skip: Callable[[str, nn.Module], str | None] = lambda name, layer: None
    """Returns for (name, layer) the reason to skip it, such as a shape that FP8 does not support, or None."""
    packs: bool = False
    """Whether the new layer stores weights in another shape or dtype, so that they cannot replace tied ones."""
    keeps: Callable[[nn.Module, nn.Parameter], bool] = lambda layer, param: False
    """Returns for (old layer, parameter) whether the new layer uses the same parameter: its gradient and hooks stay."""
    takes: frozenset[str] = frozenset({"weight", "bias"})
    """Names of parameters, buffers and children that `make` takes over; layers with others are an error."""


class Position(NamedTuple):
    """One name of a module, and its position: `parents[-1]._modules[key]`."""

    name: str
    key: str
    parents: tuple[nn.Module, ...]


@dataclass
class Layer:
    """A module of a type that the table names, or of a subclass, with all its positions."""

    module: nn.Module
    kind: type[nn.Module]  # its type, or the nearest base class that the table names
    replacement: Replacement
    positions: list[Position] = field(default_factory=list)
    reason: str | None = None  # why it is skipped

    @property
    def name(self) -> str:
        return self.positions[0].name

    @property
    def converts(self) -> bool:
        return self.reason is None


def find_layers(
    root: nn.Module, top: nn.Module, table: Mapping[type[nn.Module], Replacement], include: Patterns, exclude: Patterns
) -> list[Layer]:
    """Returns, in definition order, the layers of the types in `table` and of subclasses of them.

    `top` is a module that holds `root` as its one child. Raises `ValueError` for a pattern that matches no module.
    """
    included, excluded = _patterns(include), _patterns(exclude) or ()
    names = [name for name, _ in root.named_modules(remove_duplicate=False)]
    check_all_used((*(included or ()), *excluded), names, "module")
    layers = _find(top, table)
    for layer in layers:
        layer.reason = _outside(layer, included, excluded) or _unsupported(layer)
    chosen = {layer.module: layer.name for layer in layers if layer.converts}
    for layer in layers:
        around = [chosen[parent] for position in layer.positions for parent in position.parents if parent in chosen]
        if layer.converts and around:
            layer.reason = f"part of {shown(around[0])}"
    return layers


def shown(name: str) -> str:
    """Returns `name`, or "(root)" for the root's empty name, as reports have it."""
    return name or "(root)"


def _patterns(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return tuple(check_pattern(pattern) for pattern in ((patterns,) if isinstance(patterns, str) else patterns))


def _find(top: nn.Module, table: Mapping[type[nn.Module], Replacement]) -> list[Layer]:
    found: dict[nn.Module, Layer] = {}
    for module, position in _walk(top, "", ()):
        kind = next((kind for kind in type(module).__mro__ if kind in table), None)
        if kind is not None:
            found.setdefault(module, Layer(module, kind, table[kind])).positions.append(position)
    return list(found.values())


def _walk(parent: nn.Module, prefix: str, parents: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, Position]]:
    parents = (*parents, parent)
    for key, child in parent._modules.items():
        if child is not None:
            name = f"{prefix}.{key}" if prefix else key
            yield child, Position(name, key, parents)
            yield from _walk(child, name, parents)


def _outside(layer: Layer, include: tuple[str, ...] | None, exclude: tuple[str, ...]) -> str | None:
    for position in layer.positions:
        pattern = next((pattern for pattern in exclude if covers(pattern, position.name)), None)
        if pattern is not None:
            reason = f"excluded by {pattern!r}"
        elif include is not None and not any(covers(pattern, position.name) for pattern in include):
            reason = "not included"
        else:
            continue
        return reason if position is layer.positions[0] else f"the same module as {position.name}, which is {reason}"
    return None


def _unsupported(layer: Layer) -> str | None:
    module = layer.module
    in_attention = any(
        position.key == "out_proj" and isinstance(position.parents[-1], nn.MultiheadAttention)
        for position in layer.positions
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
