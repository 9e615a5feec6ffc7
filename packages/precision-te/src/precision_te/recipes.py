"""The recipes: how numbers become 8 or 4 bits, as frozen values of our own that need no vendor.

Names and defaults of the fields are those of `transformer_engine.common.recipe`; what its environment variables would
change is a field here. A recipe comes by its name, as a dict, as one of these, or as the vendor's object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

FP8_FORMATS = ("e4m3", "e5m2", "hybrid")
"""hybrid: e4m3 for what the forward quantises, e5m2 for gradients (Micikevicius et al. 2022, arXiv:2209.05433)."""

AMAX_ALGORITHMS = ("max", "most_recent")
MARGINS = range(-112, 128)
"""57344 * 2**112, of e5m2, is float32's largest power of 2 times 1.75; the vendor computes 2**margin in float32."""
BACKWARD_OVERRIDES = (None, "high_precision", "dequantized")


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    name: ClassVar[str]
    vendor_class: ClassVar[str]
    """What the vendor calls it."""
    multiple: ClassVar[int] = 16
    """The vendor's kernels take layers whose in_features and out_features are multiples of this."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise self._wrong(field.name, value, "True or False")
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise self._wrong(field.name, value, "an integer")
            if field.name.endswith("_scaling_dim") and value not in (1, 2):
                raise self._wrong(field.name, value, "1 or 2")
            if field.name == "backward_override" and value not in BACKWARD_OVERRIDES:
                raise self._wrong(field.name, value, '"high_precision", "dequantized" or None')
            if field.name == "fp8_format":
                object.__setattr__(self, field.name, parse_fp8_format(value))

    def _wrong(self, field: str, value: object, allowed: str) -> ValueError:
        return ValueError(f"{type(self).__name__}({field}={value!r}): expected {allowed}")

    @property
    def forward_format(self) -> str:
        """The format of inputs and weights: "e4m3" "e5m2" "e2m1"."""
        format: str = getattr(self, "fp8_format")  # noqa: B009  every subclass has the field, with its own default
        return "e4m3" if format == "hybrid" else format

    @property
    def grad_format(self) -> str:
        """The format of gradients: "e4m3" "e5m2" "e2m1"."""
        format: str = getattr(self, "fp8_format")  # noqa: B009
        return "e5m2" if format == "hybrid" else format


@dataclass(frozen=True, kw_only=True)
class Delayed(_Recipe):
    """One scale a tensor, from the amax of earlier steps (Micikevicius et al. 2022, section 4.2).

    Scale = (the format's largest value / amax) / 2**margin. Raises `ValueError` for what a field does not take.
    """

    name: ClassVar[str] = "delayed"
    vendor_class: ClassVar[str] = "DelayedScaling"

    margin: int = 0
    """-112 to 127."""
    fp8_format: str = "hybrid"
    amax_history_len: int = 1024
    """Steps in the history."""
    amax_compute_algo: str | Callable[[Tensor], Tensor] = "max"
    """"max" of the history, "most_recent", or a function of the history (steps, tensors) -> (tensors,)."""
    scaling_factor_compute_algo: Callable[..., Tensor] | None = None
    """A function (amax, old scale, the format's largest value, recipe) -> scale; None: the formula above."""
    reduce_amax: bool = True
    """Whether amax is reduced over ranks (max)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin not in MARGINS:
            raise self._wrong("margin", self.margin, f"{MARGINS[0]} to {MARGINS[-1]}, for which float32 has the scales")
        if self.amax_history_len < 1:
            raise self._wrong("amax_history_len", self.amax_history_len, "1 or more")
        if not callable(self.amax_compute_algo) and self.amax_compute_algo not in AMAX_ALGORITHMS:
            raise self._wrong("amax_compute_algo", self.amax_compute_algo, '"max", "most_recent" or a function')
        if self.scaling_factor_compute_algo is not None and not callable(self.scaling_factor_compute_algo):
            raise self._wrong("scaling_factor_compute_algo", self.scaling_factor_compute_algo, "a function or None")


@dataclass(frozen=True, kw_only=True)
class Current(_Recipe):
    """One scale a tensor, from its own amax. Raises `ValueError` for what a field does not take."""

    name: ClassVar[str] = "current"
    vendor_class: ClassVar[str] = "Float8CurrentScaling"

    fp8_format: str = "hybrid"
    use_power_2_scales: bool = False
    backward_override: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block(_Recipe):
    """One scale for 1x128 values, or 128x128 of weights (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).

    Raises `ValueError` for what a field does not take, and where both operands of a product have 2-D blocks.
    """

    name: ClassVar[str] = "block"
    vendor_class: ClassVar[str] = "Float8BlockScaling"

    fp8_format: str = "e4m3"
    use_f32_scales: bool = False
    """Scales are any float32; False: powers of 2."""
    x_block_scaling_dim: int = 1
    """1: blocks of 1x128, 2: blocks of 128x128; of inputs."""
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    backward_override: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        dims = (self.x_block_scaling_dim, self.w_block_scaling_dim, self.grad_block_scaling_dim)
        if dims.count(2) > 1:
            raise ValueError(f"Block: of x, w and grad at most one has 128x128 blocks (2), and they are {dims}")


@dataclass(frozen=True, kw_only=True)
class MXFP8(_Recipe):
    """One power of 2 for 32 values (OCP MX v1.0; Rouhani et al. 2023, arXiv:2310.10537).

    Raises `ValueError` for what a field does not take.
    """

    name: ClassVar[str] = "mxfp8"
    vendor_class: ClassVar[str] = "MXFP8BlockScaling"
    multiple: ClassVar[int] = 32

    fp8_format: str = "e4m3"
    enable_2d_quantization: bool = False
    """Weights have blocks of 32x32, the same in forward and backward."""
    backward_override: str | None = None


@dataclass(frozen=True, kw_only=True)
class NVFP4(_Recipe):
    """4-bit values, one 8-bit scale for 16 of them and one float32 scale a tensor (arXiv:2509.25149).

    Raises `ValueError` for what a field does not take.
    """

    name: ClassVar[str] = "nvfp4"
    vendor_class: ClassVar[str] = "NVFP4BlockScaling"

    fp4_format: str = "e2m1"
    fp8_format: str = "e4m3"
    """That of the scales."""
    disable_rht: bool = False
    """No random Hadamard transform of the operands of the weight gradient."""
    disable_stochastic_rounding: bool = False
    """Gradients are rounded to nearest."""
    disable_2d_quantization: bool = False
    """Weights have blocks of 1x16, not of 16x16."""
    backward_override: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fp4_format", _lower(self.fp4_format))
        super().__post_init__()
        if self.fp4_format != "e2m1":
            raise self._wrong("fp4_format", self.fp4_format, '"e2m1"')
        if self.fp8_format != "e4m3":
            raise self._wrong("fp8_format", self.fp8_format, '"e4m3", the format of the scales')

    @property
    def forward_format(self) -> str:
        """The format of inputs and weights."""
        return self.fp4_format

    @property
    def grad_format(self) -> str:
        """The format of gradients."""
        return self.fp4_format


Recipe: TypeAlias = Delayed | Current | Block | MXFP8 | NVFP4

RECIPES: dict[str, type[Recipe]] = {kind.name: kind for kind in (Delayed, Current, Block, MXFP8, NVFP4)}

_BY_VENDOR_CLASS = {kind.vendor_class: kind for kind in RECIPES.values()}

_NOT_OURS = {"fp8_dpa": False, "fp8_mha": False, "row_scaled_activation": False, "nvfp4_4over6": "none"}
"""Settings of the vendor's objects that ours lack, and the values with which they change nothing."""

_ROLES = ("fwd_inp", "fwd_weight", "bwd_grad")

_READ: dict[str, tuple[str, str, bool, tuple[str, ...]]] = {
    "use_power_2_scales": ("fp8_quant", "power_2_scale", True, _ROLES),
    "use_f32_scales": ("fp8_quant", "power_2_scale", False, _ROLES),
    "disable_rht": ("fp4_quant", "random_hadamard_transform", False, ("fwd_inp", "bwd_grad")),
    "disable_stochastic_rounding": ("fp4_quant", "stochastic_rounding", False, ("bwd_grad",)),
    "disable_2d_quantization": ("fp4_quant", "fp4_2d_quantization", False, ("fwd_weight",)),
}
"""Field -> the `QParams` and their setting that the vendor's kernels read in its place, the setting where the field is
True, and the roles that follow the field; it is off in others. The field itself may disagree: `QParams` are made
once, and can be replaced."""


def parse_fp8_format(value: object) -> str:
    """Returns "e4m3", "e5m2" or "hybrid" for a name in any case or the vendor's `Format`.

    Raises:
        ValueError: it is none of these.
    """
    name = _lower(value)
    if name not in FP8_FORMATS:
        raise ValueError(f"fp8_format={value!r}: expected one of {', '.join(FP8_FORMATS)}, or the vendor's Format")
    return name


def recipe_from(value: object = None, fp8_format: object = "hybrid") -> Recipe:
    """Returns the recipe that `value` spells: a name, a dict, one of ours, or the vendor's object; None: delayed.

    A dict has the recipe's name under "recipe" and fields, as `{"recipe": "delayed", "margin": 1}`. `fp8_format` is for
    a name, and for a dict that does not say it. There, "hybrid" leaves `block`, `mxfp8` and `nvfp4` their own e4m3, as
    with the vendor; with e5m2 gradients they are `{"recipe": "mxfp8", "fp8_format": "hybrid"}`.

    Raises:
        ValueError: it is unknown, has unknown fields or values, or another format than the `fp8_format` asked for.
    """
    format = parse_fp8_format(fp8_format)
    if isinstance(value, (Delayed, Current, Block, MXFP8, NVFP4)):
        recipe: Recipe = value
    elif value is None or isinstance(value, str):
        recipe = _named("delayed" if value is None else value, {}, format)
    elif isinstance(value, Mapping):
        given = dict(value)
        if "recipe" not in given:
            raise ValueError(f'recipe={given!r}: a dict names its recipe, as {{"recipe": "delayed", "margin": 1}}')
        recipe = _named(given.pop("recipe"), given, format)
    else:
        recipe = _of_vendor(value)
    if format != "hybrid" and recipe.fp8_format != format:
        raise ValueError(
            f'fp8_format={format!r} contradicts recipe={value!r}, which has "{recipe.fp8_format}": '
            f"say it in the recipe, and leave fp8_format out"
        )
    return recipe


def beyond_ours(value: object) -> str | None:
    """Returns the settings of the vendor's object that our recipes cannot express, as "fp8_dpa=True"; None: none."""
    found = [f"{name}={getattr(value, name)!r}" for name, off in _NOT_OURS.items() if getattr(value, name, off) != off]
    recipe = _of_vendor(value)
    for field in (each.name for each in fields(recipe) if each.name in _READ):
        params, key, says, roles = _READ[field]
        for role in _ROLES:
            wanted = role in roles and getattr(recipe, field) is says
            if (setting := getattr(getattr(value, f"{params}_{role}", None), key, wanted)) != wanted:
                found.append(f"{params}_{role}.{key}={setting}")
    for role in _ROLES:
        epsilon = getattr(getattr(value, f"fp8_quant_{role}", None), "amax_epsilon", 0.0)
        found += [f"fp8_quant_{role}.amax_epsilon={epsilon}"] * (epsilon != 0.0)
    return ", ".join(found) or None


def _named(name: object, given: dict[Any, Any], format: str) -> Recipe:
    kind = RECIPES.get(_lower(name))
    if kind is None:
        raise ValueError(f"recipe={name!r}: expected one of {', '.join(RECIPES)}, a dict, or the vendor's object")
    allowed = [field.name for field in fields(kind)]
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise ValueError(
            f'recipe "{kind.name}" has no {", ".join(map(repr, unknown))}: its fields are {", ".join(allowed)}; '
            f"what else the vendor's {kind.vendor_class} has goes in as that object"
        )
    if format != "hybrid":
        given.setdefault("fp8_format", format)
    return kind(**given)


def _of_vendor(value: object) -> Recipe:
    kind = next(
        (_BY_VENDOR_CLASS[base.__name__] for base in type(value).__mro__ if base.__name__ in _BY_VENDOR_CLASS), None
    )
    if kind is None:
        raise ValueError(
            f"recipe={value!r}: expected one of {', '.join(RECIPES)}, a dict, or one of the vendor's "
            f"{', '.join(_BY_VENDOR_CLASS)}"
        )
    given = {field.name: getattr(value, field.name) for field in fields(kind) if hasattr(value, field.name)}
    for name in given.keys() & _READ.keys():
        params, key, says, roles = _READ[name]
        setting = getattr(getattr(value, f"{params}_{roles[0]}", None), key, None)
        if setting is not None:
            given[name] = setting is says
    return kind(**given)


def _lower(value: object) -> str:
    """The vendor's enum members spell their name; `value.name` would be a string's, too."""
    return str(value.name if isinstance(value, Enum) else value).lower()
