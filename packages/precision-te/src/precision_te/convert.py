"""Conversion: torch's layers become an engine's, with the same parameters, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from precision_core.precision import Item
from precision_core.surgery import Replacement, Surgery, replace_layers, shown
from precision_te.coverage import is_linear
from precision_te.engine import Engine
from precision_te.quantized import is_quantized
from precision_te.recipes import Recipe

BACK = "put torch's layers back first, precision_te.restore(model)"
"""What to do where layers are converted that should not be."""


def convert(
    module: nn.Module,
    engine: Engine,
    recipe: Recipe,
    *,
    exclude: Iterable[str] = (),
    keep_first: int = 0,
    keep_last: int = 0,
    packs: bool = False,
    dry_run: bool = False,
) -> Surgery:
    """Replaces the layers of `module` that `engine` has, in place; returns what was done, with the reasons in it.

    Args:
        exclude: name patterns of modules that stay as they are.
        keep_first: so many of the linear layers that could be or are converted, in definition order, stay.
        keep_last: so many of the last ones stay.
        packs: whether linear weights are stored in another form, so that tied ones must stay.

    Raises:
        ValueError: a pattern that matches no module, layers that would lose something, layers that are to stay and are
            converted already; nothing was changed.
    """

    def table(kept: dict[str, str]) -> dict[type[nn.Module], Replacement]:
        def skip(name: str, layer: nn.Module) -> str | None:
            return kept.get(name) or engine.why_not(layer, recipe)

        def make(layer: nn.Module) -> nn.Module:
            return engine.layers[type(layer)](layer, recipe=recipe, dtype=None, name=names[layer])

        def replacement(stored_anew: bool) -> Replacement:
            keeps = lambda layer, param: not (stored_anew and param is layer.weight)  # noqa: E731
            return Replacement(make, skip, packs=stored_anew, keeps=keeps)

        return {kind: replacement(packs and issubclass(kind, nn.Linear)) for kind in engine.layers}

    def planned(kept: dict[str, str]) -> tuple[Item, ...]:
        return replace_layers(module, table(kept), exclude=exclude, dry_run=True).report.converted

    names = {layer: name for name, layer in module.named_modules()}
    kept: dict[str, str] = {}
    if keep_first or keep_last:
        done = [name for layer, name in names.items() if is_converted(layer, engine)]
        linear = [*done, *(item.name for item in planned(kept) if item.detail == nn.Linear.__name__)]
        order = {name: position for position, name in enumerate(names.values())}
        linear.sort(key=lambda name: order.get(name, 0))  # the root has another name in reports
        kept |= dict.fromkeys(linear[:keep_first], f"among the first {keep_first} linear layers, which stay")
        last = linear[max(0, len(linear) - keep_last) :]
        kept |= dict.fromkeys(last, f"among the last {keep_last} linear layers, which stay")
        if late := [name for name in done if name in kept]:
            raise ValueError(f"{late[0]}: {kept[late[0]]}, and it is converted already: {BACK}")
    surgery = replace_layers(module, table(kept), exclude=exclude, dry_run=dry_run)
    others = tuple(
        Item(shown(name), f"a {type(layer).__name__}, which is no Linear of torch's")
        for name, layer in surgery.module.named_modules()
        if is_linear(layer) and not isinstance(layer, nn.Linear) and not engine.is_layer(layer)
    )
    return replace(surgery, report=replace(surgery.report, skipped=surgery.report.skipped + others))


def is_converted(layer: nn.Module, engine: Engine) -> bool:
    """Whether `layer` is a linear layer of the engine's that a conversion made; the vendor's may be the user's own."""
    return engine.is_layer(layer) and (isinstance(layer, nn.Linear) or getattr(layer, "made_for", None) is not None)


def restore(module: nn.Module) -> nn.Module:
    """Replaces an engine's layers by torch's, in place, and returns the module.

    Parameters stay the same objects, with their gradients; only weights that were stored quantised, and those of the
    vendor's own norms with gamma around zero, come back as new ones. The engine's scales are dropped. The
    vendor's fused layers that you built are no one layer of torch's, and stay.

    Raises:
        ValueError: the module has no layer of an engine, or one of those new weights has a gradient or hooks on it.
    """
    table: dict[type[nn.Module], Replacement] = {}
    for engine in _engines(module):
        table |= dict.fromkeys(engine.restorable, Replacement(engine.restore, keeps=_comes_back))
    surgery = replace_layers(module, table)
    if not surgery.report.converted:
        raise ValueError(f"this {type(module).__name__} has no layer that precision-te converted")
    return surgery.module


def _comes_back(layer: nn.Module, param: nn.Parameter) -> bool:
    """Whether `restore` gives torch's layer this same parameter."""
    is_bias = param is getattr(layer, "bias", None)
    return is_bias or not (is_quantized(param) or getattr(layer, "zero_centered_gamma", False))


def _engines(module: nn.Module) -> list[Engine]:
    """Returns those whose layers may be in `module`; the vendor's library is asked only where it has one there."""
    from precision_te.reference.engine import ReferenceEngine
    from precision_te.vendor.engine import TransformerEngine

    vendors = TransformerEngine()
    return [ReferenceEngine(), *([vendors] if any(map(vendors.is_layer, module.modules())) else [])]
