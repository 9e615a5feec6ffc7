"""Layers of bitsandbytes' own, converted to ours: with their codes and scales, or their floats if not quantised yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from torch import Tensor, nn

from precision_bnb.loading import packed_4bit, packed_int8
from precision_bnb.packed import Format, Layout

BNB_LAYERS: tuple[type[nn.Linear], ...] = (Linear4bit, LinearNF4, LinearFP4, Linear8bitLt)

_BOOKKEEPING = (
    "state",
    "index",
    "quant_state",
    "quant_storage",
    "compute_type_is_set",
    "support_avx512bf16_for_cpu",
)


def format_of_bnb_layer(layer: nn.Linear) -> Format | None:
    """Returns how a layer of bitsandbytes is quantised; None: it still has its floats."""
    if isinstance(layer, Linear8bitLt):
        codes, scales = _int8_parts(layer)
        return None if codes is None or scales is None else Format("int8")
    state = _state_of(layer)
    return None if state is None else Format(state.quant_type, state.blocksize, state.nested)


def check_bnb_layer(name: str, layer: nn.Linear, wanted: Format | None, mode: str) -> None:
    """Raises `ValueError` for a layer that is quantised otherwise than `wanted`, None for floats that train."""
    format = format_of_bnb_layer(layer)
    if format is None:
        return
    here = name or "the model"
    if getattr(_state_of(layer), "packing_format_for_cpu", False):
        raise ValueError(
            f"{here}: bitsandbytes has repacked this layer for the CPU in an evaluation, and its scales are rounded: "
            "take the model over before it evaluates"
        )
    if wanted is None or replace(wanted, storage=format.storage) != format:
        raise ValueError(
            f"{here} is quantised by bitsandbytes in {format}, and {mode!r} is "
            f"{wanted or 'over float weights, which are gone'}: {how_to_ask_for(format)}, or give it a float model"
        )


def how_to_ask_for(format: Format) -> str:
    """Returns what to pass as `precision` for layers of that format, for errors."""
    mode = f"{format.quant_type}{'-dq' * format.double_quant}"
    usual = Format(format.quant_type, double_quant=format.double_quant)
    more = [f"block_size={format.block_size}"] * (format.block_size != usual.block_size)
    more += [f"bnb_4bit_quant_storage={format.storage}"] * (format.storage is not usual.storage)
    return f'pass precision="{mode}"' if not more else f'pass replace(MODES["{mode}"], {", ".join(more)})'


def pack_bnb_layer(layer: nn.Linear, layout: Layout) -> Tensor | None:
    """Returns the weights of a layer of bitsandbytes, packed; None: they are floats."""
    if isinstance(layer, Linear8bitLt):
        codes, scales = _int8_parts(layer)
        return None if codes is None or scales is None else packed_int8(layout, codes, scales)
    state = _state_of(layer)
    return None if state is None else packed_4bit(layout, layer.weight, state)


def float_dtype_of(layer: nn.Linear) -> torch.dtype:
    """Returns the dtype that bitsandbytes dequantises the weight to; that of its floats if it still has them."""
    state = _state_of(layer)
    if state is not None:
        dtype: torch.dtype = state.dtype
        return dtype
    return layer.weight.dtype if layer.weight.is_floating_point() else torch.float32


def floats_of(layer: nn.Linear) -> nn.Parameter:
    """Returns the float weight as a plain parameter; bitsandbytes' parameter classes quantise when they are moved."""
    weight = layer.weight
    if type(weight) is nn.Parameter:
        return weight
    return nn.Parameter(weight.detach().as_subclass(Tensor), requires_grad=weight.requires_grad)


def strip_bnb_state(layer: nn.Linear) -> None:
    """Removes bitsandbytes' attributes from a layer, so that its codes and scales can be freed."""
    for key in _BOOKKEEPING:
        vars(layer).pop(key, None)


def _state_of(layer: nn.Linear) -> Any:
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _int8_parts(layer: Linear8bitLt) -> tuple[Tensor | None, Tensor | None]:
    """Returns codes and scales, which move from the weight to the layer's state in its first forward."""
    weight: Any = layer.weight
    state: Any = layer.state
    if state.has_fp16_weights:
        return None, None
    codes = weight.CB if weight.CB is not None else state.CB
    return codes, weight.SCB if weight.SCB is not None else state.SCB
