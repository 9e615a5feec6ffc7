"""Recipes: every spelling gives the same value, and what is wrong is said."""

from __future__ import annotations

import copy
import enum
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any

import pytest

from precision_te.recipes import (
    MXFP8,
    NVFP4,
    RECIPES,
    Block,
    Current,
    Delayed,
    beyond_ours,
    parse_fp8_format,
    recipe_from,
)


class Format(enum.Enum):
    """Like the vendor's: its values are tuples, and only names tell the members apart."""

    E2M1 = (6, 6)
    E4M3 = (448, 448)
    E5M2 = (57344, 57344)
    HYBRID = (448, 57344)


@dataclass
class DelayedScaling:
    """What is read of the vendor's object of this name; `tests/vendor` has the real ones."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    scaling_factor_compute_algo: Any = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: Any = None


@dataclass
class NVFP4BlockScaling:
    disable_rht: bool = False
    nvfp4_4over6: str = "none"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3


@dataclass
class QParams:
    amax_epsilon: float = 0.0
    power_2_scale: bool = False


@dataclass
class Float8CurrentScaling:
    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp: QParams = field(default_factory=QParams)


def test_names_give_the_vendors_defaults() -> None:
    assert {name: recipe_from(name) for name in RECIPES} == {
        "delayed": Delayed(margin=0, fp8_format="hybrid", amax_history_len=1024, amax_compute_algo="max"),
        "current": Current(fp8_format="hybrid", use_power_2_scales=False),
        "block": Block(fp8_format="e4m3", x_block_scaling_dim=1, w_block_scaling_dim=2, grad_block_scaling_dim=1),
        "mxfp8": MXFP8(fp8_format="e4m3"),
        "nvfp4": NVFP4(),
    }
    assert recipe_from() == recipe_from(None) == recipe_from("DELAYED") == Delayed()


@pytest.mark.parametrize("given", ["e5m2", "E5M2", "E5m2", Format.E5M2])
def test_a_format_in_any_case_or_as_the_vendors_enum(given: Any) -> None:
    assert parse_fp8_format(given) == "e5m2"
    assert recipe_from("delayed", given) == Delayed(fp8_format="e5m2") == Delayed(fp8_format=given)
    assert recipe_from({"recipe": "current", "fp8_format": given}) == Current(fp8_format="e5m2")


@pytest.mark.parametrize("given", ["e4m4", "", None, 8, Format.E2M1, "e2m1", ["e4m3"]])
def test_another_format_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected one of e4m3, e5m2, hybrid"):
        recipe_from("delayed", given)


@pytest.mark.parametrize(
    ("recipe", "forward", "grad"),
    [
        (Delayed(), "e4m3", "e5m2"),
        (Delayed(fp8_format="e4m3"), "e4m3", "e4m3"),
        (Current(fp8_format="e5m2"), "e5m2", "e5m2"),
        (Block(), "e4m3", "e4m3"),
        (MXFP8(fp8_format="hybrid"), "e4m3", "e5m2"),
        (NVFP4(), "e2m1", "e2m1"),
    ],
)
def test_operand_formats(recipe: Any, forward: str, grad: str) -> None:
    assert (recipe.forward_format, recipe.grad_format) == (forward, grad)


def test_hybrid_is_the_arguments_default_and_leaves_block_recipes_their_own() -> None:
    assert recipe_from("mxfp8", "hybrid").fp8_format == "e4m3"
    assert recipe_from("mxfp8", "e5m2").fp8_format == "e5m2"
    assert recipe_from({"recipe": "mxfp8", "fp8_format": "hybrid"}).fp8_format == "hybrid"
    assert recipe_from({"recipe": "mxfp8"}, "e5m2").fp8_format == "e5m2"


def test_a_dict_has_the_name_and_fields() -> None:
    given = {"recipe": "delayed", "margin": 2, "amax_history_len": 16, "amax_compute_algo": "most_recent"}
    assert recipe_from(given) == Delayed(margin=2, amax_history_len=16, amax_compute_algo="most_recent")
    assert given["recipe"] == "delayed"  # it is the user's
    with pytest.raises(ValueError, match="names its recipe"):
        recipe_from({"margin": 2})
    with pytest.raises(ValueError, match=r"has no 'margins', 'x': its fields are margin, fp8_format.*DelayedScaling"):
        recipe_from({"recipe": "delayed", "margins": 2, "x": 1})
    with pytest.raises(ValueError, match=r'fp8_format=.e4m3. contradicts .*"hybrid"'):
        recipe_from({"recipe": "delayed", "fp8_format": "hybrid"}, "e4m3")
    with pytest.raises(ValueError, match="has no 'margin'"):
        recipe_from({"recipe": "mxfp8", "margin": 2})


@pytest.mark.parametrize("given", ["fp8", "", 3, object(), ["delayed"], {"recipe": "fp8"}, {"recipe": None}])
def test_an_unknown_recipe_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected one of delayed, current, block, mxfp8, nvfp4"):
        recipe_from(given)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Delayed, {"amax_history_len": 0}),
        (Delayed, {"amax_history_len": 2.0}),
        (Delayed, {"margin": "1"}),
        (Delayed, {"margin": True}),
        (Delayed, {"margin": -113}),
        (Delayed, {"margin": 128}),
        (Delayed, {"amax_compute_algo": "min"}),
        (Delayed, {"scaling_factor_compute_algo": 1}),
        (Delayed, {"reduce_amax": 1}),
        (Current, {"use_power_2_scales": "yes"}),
        (Current, {"backward_override": "none"}),
        (Block, {"w_block_scaling_dim": 3}),
        (NVFP4, {"fp4_format": "e4m3"}),
        (NVFP4, {"fp8_format": "e5m2"}),
    ],
)
def test_a_field_with_a_wrong_value_is_named(kind: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\({next(iter(given))}=.*: expected"):
        kind(**given)


def test_two_operands_with_square_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="at most one"):
        Block(x_block_scaling_dim=2)
    assert Block(x_block_scaling_dim=2, w_block_scaling_dim=1).x_block_scaling_dim == 2


def test_the_vendors_object_is_read_by_its_names() -> None:
    algorithm = lambda history: history[0]  # noqa: E731
    vendors = DelayedScaling(margin=1, fp8_format=Format.E4M3, amax_history_len=4, amax_compute_algo=algorithm)
    assert recipe_from(vendors) == Delayed(margin=1, fp8_format="e4m3", amax_history_len=4, amax_compute_algo=algorithm)
    assert recipe_from(NVFP4BlockScaling(disable_rht=True)) == NVFP4(disable_rht=True)
    with pytest.raises(ValueError, match="contradicts"):
        recipe_from(DelayedScaling(), "e4m3")
    assert recipe_from(DelayedScaling(fp8_format=Format.E4M3), "E4M3").fp8_format == "e4m3"


def test_what_only_the_vendor_has_is_named() -> None:
    assert beyond_ours(DelayedScaling()) is None
    assert beyond_ours(NVFP4BlockScaling()) is None
    assert beyond_ours(DelayedScaling(fp8_dpa=True)) == "fp8_dpa=True"
    assert beyond_ours(NVFP4BlockScaling(nvfp4_4over6="all")) == "nvfp4_4over6='all'"
    assert beyond_ours(Float8CurrentScaling(fp8_quant_fwd_inp=QParams(1e-9))) == "fp8_quant_fwd_inp.amax_epsilon=1e-09"
    power_2 = Float8CurrentScaling(fp8_quant_fwd_inp=QParams(power_2_scale=True))  # of one role alone
    power_2.fp8_quant_bwd_grad = QParams()  # type: ignore[attr-defined]
    assert beyond_ours(power_2) == "fp8_quant_bwd_grad.power_2_scale=False"


def test_recipes_are_frozen_values() -> None:
    for name, kind in RECIPES.items():
        recipe = recipe_from(name)
        assert recipe_from(recipe) is recipe
        assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe and hash(recipe) == hash(kind())
        with pytest.raises(FrozenInstanceError):
            recipe.fp8_format = "e4m3"  # type: ignore[misc]
        assert all(repr(getattr(recipe, each.name)) in repr(recipe) for each in fields(recipe))
