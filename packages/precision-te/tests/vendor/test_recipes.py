"""The vendor's recipes from ours and back, every field, whatever its environment variables say."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
from torch import nn

from precision_te import MXFP8, NVFP4, Block, Current, Delayed, TransformerEnginePrecision, recipe_from
from precision_te.recipes import RECIPES, Recipe
from precision_te.vendor.recipes import NO_PURE_E5M2, vendor_recipe

CHANGED: tuple[Recipe, ...] = (  # every field off its default, one way or another
    Delayed(
        margin=2,
        fp8_format="e4m3",
        amax_history_len=16,
        amax_compute_algo="most_recent",
        scaling_factor_compute_algo=lambda amax, scale, largest, recipe: scale,
        reduce_amax=False,
    ),
    Delayed(amax_compute_algo=lambda history: history[0]),
    Current(fp8_format="e4m3", use_power_2_scales=True, backward_override="dequantized"),
    Block(fp8_format="hybrid", use_f32_scales=True, x_block_scaling_dim=1, w_block_scaling_dim=1),
    Block(w_block_scaling_dim=1, grad_block_scaling_dim=2, backward_override="high_precision"),
    Block(w_block_scaling_dim=1, x_block_scaling_dim=2),
    MXFP8(fp8_format="hybrid", enable_2d_quantization=True, backward_override="high_precision"),
    NVFP4(disable_rht=True, disable_stochastic_rounding=True, disable_2d_quantization=True),
    NVFP4(backward_override="dequantized"),
)
ALL = (*(kind() for kind in RECIPES.values()), *CHANGED)


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_a_recipe_goes_there_and_back(recipe: Recipe, vendor_recipes: Any) -> None:
    theirs = vendor_recipe(recipe)
    assert type(theirs) is getattr(vendor_recipes, recipe.vendor_class)
    assert recipe_from(theirs) == recipe
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name in ("fp8_format", "fp4_format"):
            value = vendor_recipes.Format[value.upper()]
        assert getattr(theirs, field.name) == value, field.name


def test_every_field_was_tried_off_its_default() -> None:
    for kind in RECIPES.values():
        default = kind()
        for field in dataclasses.fields(kind):
            if field.name in ("fp4_format",) or (kind is NVFP4 and field.name == "fp8_format"):
                continue  # have one value
            tried = [getattr(recipe, field.name) for recipe in CHANGED if type(recipe) is kind]
            assert any(value != getattr(default, field.name) for value in tried), (kind, field.name)


@pytest.mark.parametrize("kind", RECIPES.values())
def test_the_defaults_are_the_vendors(kind: Any, vendor_recipes: Any) -> None:
    assert recipe_from(getattr(vendor_recipes, kind.vendor_class)()) == kind()


def test_scales_of_blocks_are_what_the_recipe_says(vendor_recipes: Any) -> None:
    """The vendor's own object ignores `use_f32_scales`: what it quantises by was made with its class."""
    ignored = vendor_recipes.Float8BlockScaling(use_f32_scales=True)
    assert ignored.fp8_quant_fwd_inp.power_2_scale
    for f32 in (False, True):
        theirs = vendor_recipe(Block(use_f32_scales=f32))
        for role in ("fwd_inp", "fwd_weight", "bwd_grad"):
            assert getattr(theirs, f"fp8_quant_{role}").power_2_scale is not f32
        theirs = vendor_recipe(Current(use_power_2_scales=f32))
        for role in ("fwd_inp", "fwd_weight", "bwd_grad"):
            assert getattr(theirs, f"fp8_quant_{role}").power_2_scale is f32
    assert vendor_recipes.Float8BlockScaling().fp8_quant_fwd_inp.power_2_scale


@pytest.mark.parametrize("kind", RECIPES.values())
def test_pure_e5m2_is_refused_by_the_vendor_in_these_words(kind: Any, vendor_recipes: Any) -> None:
    if kind is NVFP4:
        return
    with pytest.raises((ValueError, AssertionError), match=NO_PURE_E5M2):
        getattr(vendor_recipes, kind.vendor_class)(fp8_format=vendor_recipes.Format.E5M2)
    with pytest.raises(ValueError, match=rf"refuses {kind.__name__}\(.*{NO_PURE_E5M2}"):
        vendor_recipe(kind(fp8_format="e5m2"))


@pytest.mark.usefixtures("vendor_recipes")
def test_environment_variables_change_nothing(has_kernels: bool) -> None:
    variables = {
        "NVTE_BACKWARD_OVERRIDE": "dequantized",
        "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": "1",
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
        "NVTE_NVFP4_DISABLE_RHT": "1",
        "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "1",
        "NVTE_NVFP4_4OVER6": "all",
    }
    program = (
        "from precision_te.recipes import RECIPES\n"
        "from precision_te.vendor.recipes import vendor_recipe\n"
        "for kind in RECIPES.values(): print(vendor_recipe(kind()))"
    )
    building = {} if has_kernels else {"NVTE_PROJECT_BUILDING": "1"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("NVTE_")} | building
    printed = [
        subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
        for env in (clean, clean | variables)
    ]
    assert printed[0] == printed[1] and printed[0].count("recipe_type=") == len(RECIPES)


def test_a_plugin_of_either_engine_returns_the_vendors_object(vendor_recipes: Any) -> None:
    for engine in ("te", "reference"):
        plugin = TransformerEnginePrecision(engine=engine)
        recipe = plugin.setup_fp8_recipe()
        assert type(recipe) is vendor_recipes.DelayedScaling and recipe == vendor_recipes.DelayedScaling()
        assert recipe.fp8_format is vendor_recipes.Format.HYBRID
        mine = vendor_recipes.MXFP8BlockScaling()
        assert TransformerEnginePrecision(recipe=mine, engine=engine).setup_fp8_recipe() is mine
    plugin = TransformerEnginePrecision(fp8_format=vendor_recipes.Format.E4M3)
    assert plugin.setup_fp8_recipe().fp8_format is vendor_recipes.Format.E4M3
    assert plugin.setup_fp8_recipe() is plugin.setup_fp8_recipe()


@pytest.mark.usefixtures("vendor_recipes")
def test_where_the_recipes_alone_are_installed_engine_te_says_what_is_missing(has_kernels: bool) -> None:
    if has_kernels:
        pytest.skip("the whole library is installed")
    assert TransformerEnginePrecision().setup_fp8_recipe() is not None
    with pytest.raises(ImportError, match=r"cannot be imported here, FileNotFoundError: .* torch lib.*no-build-isol"):
        TransformerEnginePrecision().convert_module(nn.Linear(32, 32))


def test_settings_of_the_vendors_that_the_reference_has_not_are_refused_there(vendor_recipes: Any) -> None:
    attention = vendor_recipes.DelayedScaling(fp8_dpa=True)
    with pytest.raises(ValueError, match="the reference has no fp8_dpa=True"):
        TransformerEnginePrecision(recipe=attention, engine="reference")
    assert TransformerEnginePrecision(recipe=attention).setup_fp8_recipe() is attention


ROLES = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")


def test_the_vendors_object_is_read_by_what_its_kernels_read(vendor_recipes: Any) -> None:
    def given(kind: str, changes: dict[str, dict[str, Any]], **options: Any) -> Any:
        theirs = getattr(vendor_recipes, kind)(**options)
        for role, params in changes.items():
            setattr(theirs, role, vendor_recipes.QParams(**params))
        return theirs

    def read(*args: Any, **options: Any) -> Recipe:
        return TransformerEnginePrecision(recipe=given(*args, **options), engine="reference").recipe

    power_of_2, none = {"power_2_scale": True}, dict[str, Any]()
    assert read("Float8BlockScaling", {}, use_f32_scales=True) == Block()
    assert read("Float8BlockScaling", dict.fromkeys(ROLES, none)) == Block(use_f32_scales=True)
    assert read("Float8CurrentScaling", dict.fromkeys(ROLES, power_of_2)) == Current(use_power_2_scales=True)
    assert read("NVFP4BlockScaling", {"fp4_quant_fwd_weight": none}) == NVFP4(disable_2d_quantization=True)
    turned = {"random_hadamard_transform": True}
    assert read("NVFP4BlockScaling", {"fp4_quant_bwd_grad": turned}) == NVFP4(disable_stochastic_rounding=True)
    refused = [
        ("Float8BlockScaling", {"fp8_quant_bwd_grad": none}, "fp8_quant_bwd_grad.power_2_scale=False"),
        ("Float8CurrentScaling", {"fp8_quant_fwd_weight": power_of_2}, "fp8_quant_fwd_weight.power_2_scale=True"),
        ("NVFP4BlockScaling", {"fp4_quant_fwd_weight": turned}, "fp4_quant_fwd_weight.random_hadamard_transform=True"),
        ("NVFP4BlockScaling", {"fp4_quant_bwd_grad": none}, "fp4_quant_bwd_grad.random_hadamard_transform=False"),
        ("NVFP4BlockScaling", {"fp4_quant_fwd_inp": {"fp4_2d_quantization": True} | turned}, "inp.fp4_2d_quantiza"),
    ]
    for kind, changes, message in refused:
        with pytest.raises(ValueError, match=rf"the reference has no .*{message}"):
            read(kind, changes)
        assert TransformerEnginePrecision(recipe=given(kind, changes)).setup_fp8_recipe() is not None


def test_the_vendors_pure_e5m2_and_other_objects_are_refused(vendor_recipes: Any) -> None:
    with pytest.raises(ValueError, match=NO_PURE_E5M2):
        TransformerEnginePrecision(fp8_format=vendor_recipes.Format.E5M2)
    with pytest.raises(ValueError, match="CustomRecipe"):
        TransformerEnginePrecision(recipe=vendor_recipes.CustomRecipe(qfactory=lambda role: None))
