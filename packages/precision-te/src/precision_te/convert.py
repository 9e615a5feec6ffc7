"""Conversion: torch's layers become an engine's, with the same parameters, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable

from torch import nn

from precision_core.report import Item
from precision_core.surgery import Replacement, Surgery, replace_layers
from precision_te.engine import Engine
from precision_te.recipes import Recipe

SMALL = 1024 * 1024
"""Weights of a linear layer below which a report names it: quantising its inputs may cost what the products save."""


def convert(
    module: nn.Module,
    engine: Engine,
    recipe: Recipe,
    *,
    exclude: Iterable[str] = (),
    keep_first: int = 0,
    keep_last: int = 0,
    packs: bool = False,
    fuse: Callable[[nn.Module, Collection[str]], None] | None = None,
    dry_run: bool = False,
) -> Surgery:
    """Replaces the layers of `module` that `engine` has, in place; returns what was done, with the reasons in it.

    Args:
        exclude: name patterns of modules that stay as they are.
        keep_first: so many of the linear layers that could be converted, in definition order, stay.
        keep_last: so many of the last ones stay.
        fuse: told the module and the names of what will be converted, before it is.
        packs: whether linear weights are stored in another form, so that tied ones must stay.

    Raises:
        ValueError: a pattern that matches no module, layers that would lose something; nothing was changed.
    """

    def table(kept: dict[str, str]) -> dict[type[nn.Module], Replacement]:
        def skip(name: str, layer: nn.Module) -> str | None:
            return kept.get(name) or engine.why_not(layer, recipe)

        def make(layer: nn.Module) -> nn.Module:
            return engine.layers[type(layer)](layer, recipe=recipe, dtype=None, name=names[layer])

        return {kind: Replacement(make, skip, packs=packs and issubclass(kind, nn.Linear)) for kind in engine.layers}

    def planned(kept: dict[str, str]) -> tuple[Item, ...]:
        return replace_layers(module, table(kept), exclude=exclude, dry_run=True).report.converted

    names = {layer: name for name, layer in module.named_modules()}
    kept: dict[str, str] = {}
    if keep_first or keep_last:
        linear = [item.name for item in planned(kept) if item.detail == nn.Linear.__name__]
        kept |= dict.fromkeys(linear[:keep_first], f"among the first {keep_first} linear layers, which stay")
        last = linear[max(0, len(linear) - keep_last) :]
        kept |= dict.fromkeys(last, f"among the last {keep_last} linear layers, which stay")
    if fuse is not None and not dry_run:
        known = set(names.values())  # without what stands for the root
        fuse(module, [item.name for item in planned(kept) if item.name in known])
    return replace_layers(module, table(kept), exclude=exclude, dry_run=dry_run)


def small_layers(module: nn.Module, engine: Engine) -> list[str]:
    """Returns the names of the engine's linear layers whose weights are fewer than `SMALL`."""
    layers = [(name, layer) for name, layer in module.named_modules() if engine.is_layer(layer)]
    weights = [(name, getattr(layer, "weight", None)) for name, layer in layers]
    return [name for name, weight in weights if weight is not None and weight.dim() == 2 and weight.numel() < SMALL]


def restore(module: nn.Module) -> nn.Module:
    """Puts torch's layers back in the place of an engine's, in place, and returns the module.

    Parameters stay the same objects; only weights that were stored quantised come back as new ones, of floats. What the
    engine knew of scales is dropped. The vendor's fused layers that you built are no one layer of torch's, and stay.

    Raises:
        ValueError: the module has no layer of an engine.
    """
    table: dict[type[nn.Module], Replacement] = {}
    for engine in _engines():
        table |= dict.fromkeys(engine.restorable, Replacement(engine.restore))
    surgery = replace_layers(module, table)
    if not surgery.report.converted:
        raise ValueError(f"this {type(module).__name__} has no layer that precision-te converted")
    return surgery.module


def _engines() -> list[Engine]:
    from precision_te.reference.engine import ReferenceEngine

    engines: list[Engine] = [ReferenceEngine()]
    if "transformer_engine.pytorch" in sys.modules:  # else nobody can have one of its layers
        from precision_te.vendor.engine import TransformerEngine

        engines.append(TransformerEngine())
    return engines
