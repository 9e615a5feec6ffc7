"""Engine `te`: NVIDIA Transformer Engine's layers, contexts and answers, on its GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from precision_te.recipes import Delayed, Recipe
from precision_te.vendor.library import ELSEWHERE, load
from precision_te.vendor.microbatches import accumulating
from precision_te.vendor.recipes import vendor_recipe

_PROBES = {
    "delayed": "is_fp8_available",
    "current": "is_fp8_available",
    "block": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
    "nvfp4": "is_nvfp4_available",
}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TransformerEngine:
    """The engine of one plugin.

    Args:
        given: the vendor's recipe, where the user gave one: it is used as it is.
        pad: pad shapes that FP8 cannot take with zeros: inputs in each forward, weights once a step.
        quantized_weights: linear weights are stored quantised alone (the vendor's `quantized_model_init`).
    """

    name = "te"

    def __init__(self, given: Any = None, *, pad: bool = False, quantized_weights: bool = False) -> None:
        self._given, self._pad, self._quantized = given, pad, quantized_weights
        self._recipes: dict[Recipe, Any] = {}
        self._checked: set[Recipe] = set()

    @property
    def layers(self) -> Mapping[type[nn.Module], Callable[..., nn.Module]]:
        """torch's type of layer -> what makes the vendor's."""
        return {nn.Linear: self._linear, nn.LayerNorm: _norm, nn.RMSNorm: _norm}

    def vendor_recipe(self, recipe: Recipe) -> Any:
        """Returns the vendor's recipe, always the same object, by which the vendor sees that nothing changed."""
        if self._given is not None:
            return self._given
        if recipe not in self._recipes:
            self._recipes[recipe] = vendor_recipe(recipe)
        return self._recipes[recipe]

    def check(self, recipe: Recipe) -> None:
        """Raises `ImportError` without the library, `ValueError` with its reason where the GPU cannot run `recipe`."""
        te = load()
        try:
            available, reason = getattr(te, _PROBES[recipe.name])(return_reason=True)
        except Exception as error:  # without a GPU or a driver torch raises various types
            raise ValueError(f"Transformer Engine needs an NVIDIA GPU: {error}; {ELSEWHERE}") from error
        if not available:
            raise ValueError(f'Transformer Engine cannot run recipe "{recipe.name}" on this GPU: {reason}; {ELSEWHERE}')

    def why_not(self, layer: nn.Module, recipe: Recipe) -> str | None:
        """Returns why the vendor's layer cannot replace this one; None: it can."""
        kind = next(kind for kind in type(layer).__mro__ if kind in _WHY_NOT)
        return _WHY_NOT[kind](layer, 1 if self._pad else recipe.multiple)

    def is_layer(self, module: nn.Module) -> bool:
        """Whether `module` is of a class of the vendor's, or derived from one."""
        return any(kind.__module__.startswith("transformer_engine.pytorch") for kind in type(module).__mro__)

    @property
    def restorable(self) -> tuple[type[nn.Module], ...]:
        """Ours, and the vendor's linear layers and norms; its own fused layers are no one layer of torch's."""
        from precision_te.vendor import layers

        te, ours = load(), (layers.TELinear, layers.TEDelayedLinear, layers.TELayerNorm, layers.TERMSNorm)
        return (*ours, te.Linear, te.LayerNorm, te.RMSNorm)

    def restore(self, layer: nn.Module) -> nn.Module:
        """Returns torch's layer with the same parameters; quantised ones are dequantised."""
        new = _torchs(layer)
        kind: Any = type(layer)
        for key in (vars(layer).keys() - vars(new).keys()) & _own(kind):
            del vars(layer)[key]  # what is left is the user's, and moves to the new layer
        return new

    def context(
        self, recipe: Recipe, *, group: dist.ProcessGroup | None = None, calibrating: bool = False
    ) -> AbstractContextManager[Any]:
        """Returns the vendor's `autocast`; raises as `check` does, where the vendor's would leave its state changed."""
        if recipe not in self._checked:
            self.check(recipe)
            self._checked.add(recipe)
        return load().autocast(
            enabled=not calibrating,
            calibrating=calibrating,
            recipe=self.vendor_recipe(recipe),
            amax_reduction_group=group,
        )

    def accumulation_context(self) -> AbstractContextManager[Any]:
        """Context of microbatches after which another comes before the step: weights are quantised in the first."""
        return accumulating()

    def weights_context(self, recipe: Recipe) -> AbstractContextManager[Any]:
        """Returns the vendor's `quantized_model_init`: its layers made in it store their weights quantised alone."""
        return load().quantized_model_init(enabled=True, recipe=self.vendor_recipe(recipe))

    def register(self, module: nn.Module) -> None:
        """Does nothing: the vendor's library has its own list of layers, those that ran."""

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what the vendor's `checkpoint` does; it is not reentrant unless `use_reentrant` says so."""
        return load().checkpoint(function, *args, **{"use_reentrant": False} | kwargs)

    def _linear(self, layer: nn.Linear, *, recipe: Recipe, dtype: torch.dtype | None, name: str) -> nn.Module:
        from precision_te.vendor import layers

        kind: Any = layers.TEDelayedLinear if isinstance(recipe, Delayed) else layers.TELinear
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
        dtype = dtype or layer.weight.dtype
        if self._quantized:
            device = "meta" if layer.weight.is_meta else "cuda"
            with self.weights_context(recipe), torch.no_grad():
                new = kind(**sizes, params_dtype=dtype, device=device)
                if device != "meta":
                    new.weight.copy_(layer.weight)
        else:
            new = kind(**sizes, params_dtype=dtype, device="meta")
            new.weight = layer.weight
        if layer.bias is not None:
            new.bias = layer.bias
        new.made_for = recipe.name
        if isinstance(recipe, Delayed):
            new.history = recipe.amax_history_len
        if self._pad:
            new.multiple = recipe.multiple
        return new


def _norm(layer: Any, *, recipe: Recipe, dtype: torch.dtype | None, name: str) -> nn.Module:
    from precision_te.vendor import layers

    kind = layers.TELayerNorm if isinstance(layer, nn.LayerNorm) else layers.TERMSNorm
    new = kind(layer.normalized_shape, eps=layer.eps, dtype=layer.weight.dtype, device="meta")
    new.weight = layer.weight
    if isinstance(layer, nn.LayerNorm):
        new.bias = layer.bias
    return new


def _linear_why_not(layer: Any, multiple: int) -> str | None:
    out, inputs = layer.weight.shape
    if not layer.weight.numel():
        return "it has no weights"
    if layer.weight.dtype not in _DTYPES:
        return f"its weight is {layer.weight.dtype}"
    if out % multiple or inputs % multiple:
        return f"{inputs} inputs and {out} outputs: this recipe takes multiples of {multiple} (pad=True pads them)"
    return None


def _layer_norm_why_not(layer: Any, multiple: int) -> str | None:
    missing = [key for key in ("weight", "bias") if getattr(layer, key) is None]
    return f"it has no {' and no '.join(missing)}, and the vendor's always has" if missing else _norm_dtype(layer)


def _rms_norm_why_not(layer: Any, multiple: int) -> str | None:
    if layer.weight is None:
        return "it has no weight, and the vendor's always has"
    if layer.eps is None:
        return "its eps follows the input's dtype (eps=None), and the vendor's is a number"
    return _norm_dtype(layer)


def _norm_dtype(layer: Any) -> str | None:
    return None if layer.weight.dtype in _DTYPES else f"its weight is {layer.weight.dtype}"


_WHY_NOT: dict[type[nn.Module], Callable[[Any, int], str | None]] = {
    nn.Linear: _linear_why_not,
    nn.LayerNorm: _layer_norm_why_not,
    nn.RMSNorm: _rms_norm_why_not,
}


# ---------------------------------------------------------------- back to torch's


def _torchs(layer: Any) -> nn.Module:
    te, weight = load(), _plain(layer.weight)
    if isinstance(layer, te.Linear):
        new: Any = nn.Linear(layer.in_features, layer.out_features, layer.use_bias, device="meta")
        new.weight = weight
        if layer.use_bias:
            new.bias = layer.bias
        return new
    if getattr(layer, "zero_centered_gamma", False):
        weight = nn.Parameter(weight.detach() + 1.0, weight.requires_grad)
    kind = nn.LayerNorm if hasattr(layer, "bias") else nn.RMSNorm
    new = kind(tuple(weight.shape), eps=layer.eps, device="meta")
    new.weight = weight
    if kind is nn.LayerNorm:
        new.bias = layer.bias
    return new


def _plain(weight: Any) -> nn.Parameter:
    if not hasattr(weight, "dequantize") or type(weight) in (Tensor, nn.Parameter):
        return weight
    return nn.Parameter(weight.dequantize().detach(), weight.requires_grad)


@cache
def _own(kind: Any) -> set[str]:
    """Returns the names of the attributes that layers of this class have of themselves."""
    vendors = next((base for base in kind.__mro__ if base.__module__.startswith("transformer_engine.")), None)
    if vendors is None:
        return set()
    sizes = (16, 16) if "Linear" in vendors.__name__ else (16,)
    later = {"forwarded_at_least_once", "_is_fsdp2", "allow_different_data_and_param_types", "fp8_parameters"}
    return {*vars(vendors(*sizes, device="meta")), *later, "made_for", "history", "multiple", "kept", "_loaded"}
