"""Checks of a plugin's arguments, and of a model that has an engine's layers already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from precision_core.policy import check_pattern, covers
from precision_core.support import base_of
from precision_te.convert import BACK, is_converted
from precision_te.engine import Engine
from precision_te.recipes import Recipe, beyond_ours
from precision_te.reference.engine import ReferenceEngine
from precision_te.vendor.engine import TransformerEngine
from precision_te.vendor.recipes import NO_PURE_E5M2

_CALL = "TransformerEnginePrecision"


def check_base(precision: object, modes: dict[str, dict[str, str]]) -> None:
    """Raises `ValueError` where `precision` is one of this package's `modes`, not a base mode."""
    mode = base_of(precision) if isinstance(precision, str) else None
    if mode in modes:
        options = ", ".join(f'{name}="{value}"' for name, value in modes[mode].items())
        raise ValueError(
            f"{_CALL}({precision!r}): it takes the base mode around those layers, as in "
            f'{_CALL}("bf16-mixed", {options}); by that name it is Fabric(precision={precision!r})'
        )


def check_flags(**values: Any) -> None:
    """Raises `ValueError` for the first that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{_CALL}({name}={value!r}): expected True or False")


def check_counts(**values: Any) -> None:
    """Raises `ValueError` for the first that is not a number of layers, 0 or more."""
    for name, value in values.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{_CALL}({name}={value!r}): expected a number of layers")


def name_patterns(exclude: Any) -> tuple[str, ...]:
    """Returns the patterns of `exclude`, one or several; raises `ValueError` for an invalid one."""
    if not isinstance(exclude, Iterable):
        raise ValueError(f'{_CALL}(exclude={exclude!r}): expected name patterns, as {{"lm_head", "blocks.0"}}')
    return tuple(check_pattern(pattern) for pattern in ([exclude] if isinstance(exclude, str) else exclude))


def check_engine(engine: str, recipe: Recipe, given: Any, **options: bool) -> None:
    """Raises `ValueError` for what `engine` lacks: a format, an option, a setting of the vendor's `given`."""
    if engine == "te" and recipe.fp8_format == "e5m2":
        raise ValueError(
            f'{_CALL}(fp8_format="e5m2"): Transformer Engine says: {NO_PURE_E5M2} '
            'Use "hybrid", whose gradients are e5m2, or engine="reference"'
        )
    if engine == "te":
        return
    if wanted := [name for name, value in options.items() if value]:
        raise ValueError(f'{_CALL}({wanted[0]}=True): only engine="te" does that')
    if given is not None and (settings := beyond_ours(given)):
        raise ValueError(f'{_CALL}(recipe=...): the reference has no {settings}; engine="te" does')


def check_layers(module: nn.Module, engine: Engine, recipe: Recipe, exclude: Iterable[str]) -> None:
    """Raises `ValueError` where layers of an engine are in `module` that would not do what is asked for now.

    They are another engine's, were converted for another recipe, are named by the patterns of `exclude`, or have a
    size that `recipe` does not take.
    """
    others = [each for each in (ReferenceEngine(), TransformerEngine()) if each.name != engine.name]
    for name, layer in module.named_modules(remove_duplicate=False):
        shown = name or "the model"
        for other in others:
            if other.is_layer(layer):
                raise ValueError(
                    f'{shown} is a {type(layer).__name__}, which is of engine="{other.name}" and computes in no recipe '
                    f'under engine="{engine.name}": {BACK}'
                )
        if not engine.is_layer(layer):
            continue
        made_for = getattr(layer, "made_for", None)  # by our conversion; the user's own take any recipe
        if made_for not in (None, recipe.name):
            raise ValueError(
                f'{shown} was converted for recipe "{made_for}", and this plugin has "{recipe.name}": {BACK}'
            )
        pattern = next((pattern for pattern in exclude if covers(pattern, name)), None)
        why = f"excluded by {pattern!r}" if pattern is not None else None
        if why is None and is_converted(layer, engine):
            sizes: Any = layer
            why = engine.why_not(nn.Linear(sizes.in_features, sizes.out_features, device="meta"), recipe)
        if why is not None:
            raise ValueError(f"{shown}: {why}, and it is a {type(layer).__name__} already: {BACK}")
