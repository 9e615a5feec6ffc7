"""The vendor's recipes from ours; the other way is `precision_te.recipes.recipe_from`."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Any

from precision_te.recipes import Block, Current, Recipe
from precision_te.vendor.library import load_recipes

NO_PURE_E5M2 = "Pure E5M2 training is not supported."
"""What Transformer Engine says, of each of its recipes."""

_OFF = {"backward_override": None, "row_scaled_activation": False, "nvfp4_4over6": "none"}
"""Fields that a recipe of the vendor's has beyond ours, and whose defaults its environment variables change."""


def vendor_recipe(recipe: Recipe) -> Any:
    """Returns the object of `transformer_engine.common.recipe` for one of ours, every field said.

    So NVTE_ variables, from which some of its fields have their defaults, change nothing.

    Raises:
        ImportError: the library is missing; says what to install.
        ValueError: the vendor refuses it, with its reason; or this version of the vendor's has not all the fields.
    """
    module = load_recipes()
    kind = getattr(module, recipe.vendor_class)
    values = {field.name: _theirs(module, field.name, getattr(recipe, field.name)) for field in fields(recipe)}
    known = {field.name for field in fields(kind)}
    if missing := sorted(values.keys() - known):  # the vendor ignores unknown arguments silently
        raise ValueError(f"this version of Transformer Engine has no {', '.join(missing)} in its {kind.__name__}")
    off = {name: value for name, value in _OFF.items() if name in known}
    try:
        made = kind(**off | values)
    except (AssertionError, ValueError) as error:
        reasons = "; ".join(each["msg"] for each in error.errors()) if hasattr(error, "errors") else error
        raise ValueError(f"Transformer Engine refuses {recipe}: {reasons}") from error
    if isinstance(recipe, (Block, Current)):
        # The scales are what these say, which the vendor makes once, for the default of the class.
        power_of_2 = recipe.use_power_2_scales if isinstance(recipe, Current) else not recipe.use_f32_scales
        params = module.QParams(power_2_scale=power_of_2, amax_epsilon=0.0)
        made.fp8_quant_fwd_inp = made.fp8_quant_fwd_weight = made.fp8_quant_bwd_grad = params
    return made


def _theirs(module: ModuleType, name: str, value: Any) -> Any:
    return module.Format[value.upper()] if name in ("fp8_format", "fp4_format") else value
