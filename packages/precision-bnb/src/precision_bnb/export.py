"""A state dict in bitsandbytes' own form, as transformers, vLLM and others load it: the way out of packed weights.

The way in is `load_state_dict`, which takes that form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from precision_bnb.layers import Quantized, QuantizedLinear
from precision_bnb.packed import layout_of
from precision_bnb.quantizing import dequantize
from precision_bnb.views import Views
from precision_core.checkpoint import is_sharded


def bitsandbytes_state_dict(module: nn.Module, state_dict: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns `state_dict`, by default the module's own, with packed weights as bitsandbytes' layers save them.

    4 bits: `weight` (codes), `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`, and with
    double quantisation `weight.nested_absmax` and `weight.nested_quant_map`; 8 bits: `weight` (rows, columns), `SCB`,
    `weight_format`. Codes are views. Quantised embeddings, and layers of a class that bitsandbytes' users do not
    replace, become floats. Everything else stays as it is; so does what is in bitsandbytes' form already. Sharded
    weights are gathered: all ranks call it then.
    """
    layers = {f"{name}.weight" if name else "weight": each for name, each in module.named_modules()}
    result: dict[str, Any] = {}
    for key, value in (module.state_dict() if state_dict is None else state_dict).items():
        layer = layers.get(key)
        if isinstance(layer, Quantized) and isinstance(value, Tensor):
            result.update(_theirs(key, value, layer))
        else:
            result[key] = value
    return result


def is_exported(layer: nn.Module) -> bool:
    """Whether a layer is written in bitsandbytes' form, rather than as floats."""
    return isinstance(layer, QuantizedLinear) and layer.source_cls.__name__ in ("Linear", "Conv1D")


def _theirs(key: str, value: Tensor, layer: Quantized) -> dict[str, Tensor]:
    packed: Any = value
    packed = packed.full_tensor() if is_sharded(value) else value.detach()
    layout = layout_of(packed, layer.layout.format.storage)
    if layout is None:
        return {key: value}
    if not is_exported(layer):
        floats = dequantize(packed, layout, layer.float_dtype)
        return {key: floats.t().contiguous() if layer.transposed else floats}
    parts = layout.parts(packed)
    if layout.format.quant_type == "int8":
        prefix = key.removesuffix("weight")
        more = {f"{prefix}SCB": parts.scales.clone(), f"{prefix}weight_format": torch.tensor(0, dtype=torch.uint8)}
        return {key: parts.codes, **more}
    codes, state = Views(packed, layout).state(layer.float_dtype)
    storage = layout.format.storage
    codes = codes.view(-1).view(storage).view(-1, 1) if codes.numel() % storage.itemsize == 0 else codes
    # Clones: safetensors takes no two tensors in the same memory, and the table is shared by all layers.
    return {key: codes, **{f"{key}.{name}": each.clone() for name, each in state.as_dict(packed=True).items()}}
