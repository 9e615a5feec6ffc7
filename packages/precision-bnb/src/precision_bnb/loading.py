"""Loading a checkpoint into a quantised layer: packed weights, floats to quantise, or bitsandbytes' tensors."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from precision_bnb.packed import Layout, check_footer, layout_of
from precision_bnb.quantizing import quantize
from precision_core.checkpoint import cut, is_sharded

if TYPE_CHECKING:
    from precision_bnb.layers import Quantized


def load_packed(layer: Quantized, state: MutableMapping[str, Any], prefix: str) -> None:
    """Replaces the weight that `state` has for `layer` by packed weights; without one nothing changes.

    Raises:
        ValueError: weights of another format or shape.
    """
    key = f"{prefix}weight"
    found = state.get(key)
    if not isinstance(found, Tensor):
        return
    live, layout = layer.weight, layer.layout
    if is_sharded(found):
        check_shard(found, layout)
        return
    _load_unsharded(layer, state, prefix, found)
    if is_sharded(live):
        state[key] = cut(state[key], live)


def _load_unsharded(layer: Quantized, state: MutableMapping[str, Any], prefix: str, found: Tensor) -> None:
    key, layout = f"{prefix}weight", layer.layout
    theirs = layout_of(found, layout.format.storage)
    if theirs is not None:
        _check(theirs, layout)
        state[key] = found.reshape(-1).view(torch.uint8).view(layout.format.storage).view(layout.shape)
        return
    if f"{key}.absmax" in state or f"{prefix}SCB" in state:
        state[key] = _from_bitsandbytes(layout, state, prefix)
        return
    floats = (layout.columns, layout.rows) if layer.transposed else (layout.rows, layout.columns)
    if not found.is_floating_point() or tuple(found.shape) != floats:
        raise ValueError(
            f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)} in the checkpoint; expected "
            f"packed {layout.format}, or floats of shape {floats}"
        )
    device = layer.quantizes_on or (None if layer.weight.is_meta else layer.weight.device)
    state[key] = quantize(found, layout.format, transposed=layer.transposed, device=device)


def check_shard(shard: Any, layout: Layout) -> None:
    """Raises `ValueError` where this rank's shard of packed weights, a DTensor, has another footer than `layout`."""
    local = shard.to_local()
    if not local.numel():
        return
    (chunk,) = shard.__create_chunk_list__()
    flat = local.detach().reshape(-1).view(torch.uint8)
    mismatch = check_footer(flat, chunk.offsets[0] * shard.element_size(), layout)
    if mismatch is not None:
        raise ValueError(f"{mismatch} in the checkpoint, this layer is {layout.format}")


def _check(theirs: Layout, mine: Layout) -> None:
    if theirs.format != mine.format:
        raise ValueError(f"{theirs.format} in the checkpoint, this layer is {mine.format}")
    if theirs != mine:
        shapes = f"({theirs.rows}, {theirs.columns}) in the checkpoint, ({mine.rows}, {mine.columns}) in the layer"
        raise ValueError(f"packed weights of shape {shapes}")


def _from_bitsandbytes(layout: Layout, state: MutableMapping[str, Any], prefix: str) -> Tensor:
    """Removes bitsandbytes' tensors for one layer from `state`, and returns them packed."""
    key = f"{prefix}weight"
    if f"{prefix}SCB" in state:
        scales = state.pop(f"{prefix}SCB")
        state.pop(f"{prefix}weight_format", None)
        return packed_int8(layout, state[key], scales)
    stats = {name: state.pop(name) for name in list(state) if name.startswith(f"{key}.")}
    quant_state = bnb.QuantState.from_dict({name: value.clone() for name, value in stats.items()}, state[key].device)
    return packed_4bit(layout, state[key], quant_state)


def packed_4bit(layout: Layout, codes: Tensor, state: Any) -> Tensor:
    """Returns bitsandbytes' 4-bit weights, packed; raises `ValueError` unless they are of that layout."""
    format = layout.format
    theirs = (state.quant_type, state.blocksize, state.nested, tuple(state.shape))
    mine = (format.quant_type, format.block_size, format.double_quant, (layout.rows, layout.columns))
    if theirs != mine:
        raise ValueError(f"bitsandbytes' {theirs} in the checkpoint, this layer is {mine}")
    packed = layout.empty(codes.device)
    parts = layout.parts(packed)
    parts.codes.copy_(codes.detach().reshape(-1).view(torch.uint8)[: parts.codes.numel()])
    parts.scales.copy_(state.absmax)
    if parts.nested is not None and parts.offset is not None:
        parts.nested.copy_(state.state2.absmax)
        parts.offset.fill_(float(state.offset))
    return packed


def packed_int8(layout: Layout, codes: Tensor, scales: Tensor) -> Tensor:
    """Returns bitsandbytes' int8 weights, packed; raises `ValueError` unless they are of that layout."""
    if layout.format.quant_type != "int8" or tuple(codes.shape) != (layout.rows, layout.columns):
        raise ValueError(f"bitsandbytes' int8 {tuple(codes.shape)} in the checkpoint, this layer is {layout}")
    packed = layout.empty(codes.device)
    parts = layout.parts(packed)
    parts.codes.copy_(codes.detach())
    parts.scales.copy_(scales.detach().float())
    return packed
