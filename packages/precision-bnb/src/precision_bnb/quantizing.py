"""Quantising floats into packed weights, a chunk at a time, and back.

Codes and scales are bit for bit those of bitsandbytes' `quantize_4bit` and `int8_vectorwise_quant` of the whole weight.
What comes back is right for every shape: with AVX-512, bitsandbytes' own `dequantize_4bit` takes a row to begin a
block, which is wrong where the columns are no multiple of the block size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from precision_bnb.config import COMPUTE_DTYPES
from precision_bnb.packed import NESTED_BLOCK, Format, Layout, Parts

_CHUNK, _CHUNK_ON_GPU = 2**18, 2**24
"""Weights quantised at a time: temporaries are about 20 bytes a weight. On a CPU larger and smaller chunks were slower;
on a GPU each chunk takes about eight kernel launches, and its codes come back in a copy that is waited for."""
_LARGEST_BLOCK = 1024
"""Of bitsandbytes' AVX512 kernel; for larger ones it calls torch.compile. A block is as well several with one scale."""

_NOT_FINITE = "its weights must be finite, and some are infinite or NaN [nonfinite-weights]"
_NOT_IN_HALF = (
    "its weights must be finite and at most 65504 in magnitude, for int8 quantisation casts to float16: "
    "some are infinite, NaN or larger [nonfinite-weights]"
)

_CPU = torch.device("cpu")
_codes: dict[tuple[str, torch.device], Tensor] = {}


def quantize(weight: Tensor, format: Format, *, transposed: bool = False, device: torch.device | None = None) -> Tensor:
    """Returns packed weights for floats (rows, columns), or (columns, rows) when `transposed`; on the same device.

    `device` is where it is computed, a chunk at a time; None: where the weight is.

    Raises:
        ValueError: weights that are not of a floating dtype, or not of two dimensions; infinite ones or NaN; for int8
            such as float16 cannot hold.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected floating weights of two dimensions, got {weight.dtype} {tuple(weight.shape)}")
    weight = weight.detach().t() if transposed else weight.detach()
    layout = Layout(format, *weight.shape)
    packed = layout.empty(weight.device)
    if has_values(weight) and weight.numel():
        write = _quantize_8bit if format.quant_type == "int8" else _quantize_4bit
        write(weight, packed, layout, device or weight.device)
    return packed


def check_values(weight: Tensor, format: Format | None) -> None:
    """Raises `ValueError` for weights that cannot be quantised, without temporaries; `format` None: int8-training."""
    if not has_values(weight) or not weight.numel():
        return
    low, high = weight.detach().aminmax()
    through_half = format is None or format.quant_type == "int8"
    if not bool(torch.maximum(-low, high).to(torch.float16 if through_half else torch.float32).isfinite()):
        raise ValueError(_NOT_IN_HALF if through_half else _NOT_FINITE)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has memory: not on the meta device, nor traced with fake tensors (`precision estimate`)."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_floating(dtype: torch.dtype) -> None:
    """Raises `ValueError` unless `dtype` is a floating `torch.dtype`."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dequantize: expected a floating dtype, got {dtype!r}")


def dequantize(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns the weights (rows, columns) in a floating dtype; raises `ValueError` for others."""
    check_floating(dtype)
    return dequantize_parts(layout.parts(packed), layout, dtype)


def dequantize_parts(parts: Parts, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns what `dequantize` does, of views that were made before."""
    if dtype not in COMPUTE_DTYPES:  # bitsandbytes' kernels leave those unwritten
        return dequantize_parts(parts, layout, torch.float32).to(dtype)
    if layout.format.quant_type == "int8":
        return parts.codes.to(dtype).mul_(parts.scales.unsqueeze(1).mul(1.0 / 127.0))
    return _dequantize_4bit(parts, layout, dtype)


# ---------------------------------------------------------------- 4 bits


def _quantize_4bit(weight: Tensor, packed: Tensor, layout: Layout, device: torch.device) -> None:
    format = layout.format
    parts = layout.parts(packed)
    double = format.double_quant
    scales = torch.empty(len(parts.scales), dtype=torch.float32, device=device) if double else parts.scales
    for start, chunk in _chunks(weight, format.block_size, device):
        codes, state = bnb.quantize_4bit(chunk, blocksize=format.block_size, quant_type=format.quant_type)
        parts.codes[start // 2 : start // 2 + codes.numel()] = codes.view(-1)
        first = start // format.block_size
        scales[first : first + state.absmax.numel()] = state.absmax
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(_NOT_FINITE)
    if double:
        assert parts.nested is not None and parts.offset is not None
        mean = scales.mean()
        parts.offset.copy_(mean)
        codes, state = bnb.quantize_blockwise(scales - mean, blocksize=NESTED_BLOCK)
        parts.scales.copy_(codes)
        parts.nested.copy_(state.absmax)


def _chunk_size(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _CHUNK_ON_GPU


def _chunks(weight: Tensor, block_size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yields where each chunk of rows begins, in weights, and the chunk; all but the last are whole blocks."""
    columns = weight.shape[1]
    whole = block_size // math.gcd(columns, block_size)
    rows = max(1, _chunk_size(device) // (columns * whole)) * whole
    for start in range(0, weight.shape[0], rows):
        chunk = weight[start : start + rows].to(device).contiguous()
        yield start * columns, chunk.float() if chunk.dtype is torch.float64 else chunk


def _dequantize_4bit(parts: Parts, layout: Layout, dtype: torch.dtype) -> Tensor:
    scales = scales_of(layout, parts.scales, parts.nested, parts.offset)
    kind, block, weights = layout.format.quant_type, layout.format.block_size, layout.rows * layout.columns
    kernel = torch.ops.bitsandbytes.dequantize_4bit.default
    if parts.codes.device.type != "cpu":
        return kernel(parts.codes.view(-1, 1), scales, block, kind, (layout.rows, layout.columns), dtype)
    if block > _LARGEST_BLOCK:
        scales, block = scales.repeat_interleave(block // _LARGEST_BLOCK), _LARGEST_BLOCK
    if layout.columns % block == 0:
        return kernel(parts.codes.view(-1, 1), scales, block, kind, (layout.rows, layout.columns), dtype)
    whole = weights // block * block
    pieces = []
    if whole:
        shape = (whole // block, block)
        pieces.append(kernel(parts.codes[: whole // 2].view(-1, 1), scales[: shape[0]], block, kind, shape, dtype))
    if weights > whole:
        rest = parts.codes[whole // 2 :].view(-1, 1)
        shape = (1, 2 * rest.numel())  # even: for an odd number, too, the kernel would call torch.compile
        pieces.append(kernel(rest, scales[whole // block : whole // block + 1], block, kind, shape, dtype))
    flat = pieces[0].view(-1) if len(pieces) == 1 else torch.cat([piece.view(-1) for piece in pieces])
    return flat[:weights].view(layout.rows, layout.columns)


def scales_of(layout: Layout, scales: Tensor, nested: Tensor | None, offset: Tensor | None) -> Tensor:
    """Returns the float32 scales (blocks,) of 4-bit weights, dequantised where they are quantised themselves."""
    if nested is None:
        return scales
    code = nested_code(scales.device)
    wide = torch.ops.bitsandbytes.dequantize_blockwise.default(scales, nested, code, NESTED_BLOCK, torch.float32)
    return wide.add_(offset)


def code_of(quant_type: str, device: torch.device) -> Tensor:
    """Returns float32 (16,): the value of each code of a 4-bit type."""
    return _cached(quant_type, device)


def nested_code(device: torch.device) -> Tensor:
    """Returns float32 (256,): the value of each 8-bit code that scales are quantised to (double quantisation)."""
    return _cached("dynamic", device)


def pairs_of(quant_type: str, device: torch.device) -> Tensor:
    """Returns float32 (256, 2): the values of a 4-bit type that each byte of codes has, the high half's first."""
    return _cached(f"{quant_type} pairs", device)


def make_codes(format: Format, device: torch.device = _CPU) -> None:
    """Makes the tables of `format` on a device, and on the CPU, before a forward needs them.

    torch.compile could not trace that, and in a CUDA graph that is captured they would lie in memory of the graph's.
    """
    if format.quant_type != "int8":
        for each in dict.fromkeys((_CPU, device)):
            code_of(format.quant_type, each)
            pairs_of(format.quant_type, each)
            if format.double_quant:
                nested_code(each)


def _cached(name: str, device: torch.device) -> Tensor:
    key = (name, device)
    if key not in _codes:
        with _disable_current_modes():  # under fake tensors it would be one, for the rest of the process
            _codes[key] = _make_table(name) if device.type == "cpu" else _cached(name, _CPU).to(device)
    return _codes[key]


def _make_table(name: str) -> Tensor:
    if name == "dynamic":
        table: Tensor = bnb.create_dynamic_map()
        return table
    quant_type, _, pairs = name.partition(" ")
    code: Tensor = bnb.get_4bit_type(quant_type, device="cpu")
    return torch.cartesian_prod(code, code) if pairs else code


# ---------------------------------------------------------------- 8 bits


def _quantize_8bit(weight: Tensor, packed: Tensor, layout: Layout, device: torch.device) -> None:
    parts = layout.parts(packed)
    rows = max(1, _chunk_size(device) // layout.columns)
    for start in range(0, layout.rows, rows):
        codes, scales = quantize_rows(weight[start : start + rows].to(device))
        parts.codes[start : start + rows] = codes.masked_fill_((scales == 0).unsqueeze(1), 0)  # bitsandbytes' are 0 / 0
        parts.scales[start : start + rows] = scales
    if not bool(torch.isfinite(parts.scales).all()):
        raise ValueError(_NOT_IN_HALF)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes (rows, columns) and float32 scales (rows,); the codes of a row of zeros may be anything."""
    # CUDA's kernel reads rows from a pointer on, whatever the strides.
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return codes, scales
