"""Products with packed weights: bitsandbytes' arithmetic, forward and backward.

The input is (n, columns), the result (n, rows). Weights get no gradient, input and bias do. Only packed weights are
kept for backward, which dequantises them again.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from precision_bnb.packed import Layout
from precision_bnb.quantizing import dequantize, dequantize_parts, quantize_rows
from precision_bnb.views import Views

_FLOAT_PRODUCTS = ("cpu", "xpu")
"""Where bitsandbytes trains 8-bit weights by dequantising them; elsewhere inputs are quantised in training, too."""


def product(x: Tensor, packed: Tensor, bias: Tensor | None, views: Views, threshold: float, training: bool) -> Tensor:
    """Returns x W^T + bias in the dtype of `x`; `views` are those of `packed`.

    `threshold` and `training` are of int8 only.
    """
    layout = views.layout
    if layout.format.quant_type != "int8":
        if x.device.type != "cpu" and layout.columns % layout.format.block_size == 0:
            return _vendor_4bit(x, bias, views)
        return _dequantized(x, packed, bias, views)
    if training and x.device.type in _FLOAT_PRODUCTS:
        return _dequantized(x, packed, bias, views)
    codes, scales = views.parts.codes, views.parts.scales
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply(_Int8, x, packed, bias, codes, scales, layout, threshold)
    return int8_product(x, codes, scales, bias, threshold)


def _dequantized(x: Tensor, packed: Tensor, bias: Tensor | None, views: Views) -> Tensor:
    weight = dequantize_parts(views.parts, views.layout, x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply(_Dequantized, x, packed, bias, weight, views.layout)
    return F.linear(x, weight, bias)


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


class _Dequantized(Function):
    """The `weight` was dequantised in the input's dtype, and is again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, weight: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.layout = layout
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_gradients(ctx, grad), None, None


class _Int8(Function):
    """Input and weights are multiplied as int8; the gradient is that of the dequantised weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        layout: Layout,
        threshold: float,
    ) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.layout = layout
        return int8_product(x, codes, scales, bias, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_gradients(ctx, grad), None, None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (packed,) = ctx.saved_tensors
    of_input = grad @ dequantize(packed, ctx.layout, grad.dtype) if ctx.needs_input_grad[0] else None
    return of_input, None, grad.sum(0) if ctx.needs_input_grad[2] else None


def int8_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Returns what bitsandbytes' `matmul` does in evaluation, LLM.int8() (Dettmers et al. 2022), without its log lines.

    Rows of `x` are quantised to int8; columns with a value of `threshold` or more, where that is not 0, are multiplied
    as floats with the dequantised weights.
    """
    if not x.numel():
        return x.new_zeros(x.shape[0], codes.shape[0])
    if codes.shape[1] == 1 and x.device.type == "cpu":  # there torch's _int_mm is wrong for one column
        x, codes = F.pad(x, (0, 1)), F.pad(codes, (0, 1))
    # CUDA's kernels read rows from a pointer on, whatever the strides.
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    # Elsewhere quantising with a threshold writes to its input, and restores it.
    half = x.to(torch.float16, copy=threshold > 0 and x.device.type != "cuda")
    quantized, row_scales, outliers = bnb.int8_vectorwise_quant(half, threshold=threshold)
    if threshold > 0:
        mixed = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        result: Tensor = mixed(x, quantized, codes, row_scales, scales, outliers, bias)[0]
    else:
        scaled = torch.ops.bitsandbytes.int8_scaled_mm.default
        result = scaled(quantized, codes, row_scales, scales, bias=bias, dtype=x.dtype)
    return result


def _vendor_4bit(x: Tensor, bias: Tensor | None, views: Views) -> Tensor:
    """bitsandbytes' own call, with its kernels for GPUs; they take rows of whole blocks."""
    codes, state = views.state(x.dtype)
    bias = None if bias is None else bias.contiguous()  # it is read from a pointer on; the input is made contiguous
    result: Tensor = bitsandbytes.matmul_4bit(x, codes, quant_state=state, bias=bias)
    return result


# ---------------------------------------------------------------- weights that train


def training_product(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, training: bool) -> Tensor:
    """Returns x W^T + bias with the float `weight` quantised to int8 now; all three get gradients, in training.

    The gradient takes quantisation for the identity. bitsandbytes' own call is not used: on CUDA it hands its kernel a
    transposed view for the weight's gradient, which is wrong by 140 %, and it keeps codes from one step to the next.
    """
    codes, scales = quantize_rows(weight.detach())
    floats = training and x.device.type in _FLOAT_PRODUCTS
    return _apply(_Training, x, weight, bias, codes, scales, None if floats else threshold)


class _Training(Function):
    """Where there is a `threshold`, the input is quantised, too; None: the weights are dequantised."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, threshold: float | None
    ) -> Tensor:
        ctx.save_for_backward(x, codes, scales)
        ctx.dtype = weight.dtype
        if threshold is not None:
            return int8_product(x, codes, scales, bias, threshold)
        return F.linear(x, _floats(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, codes, scales = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            grad @ _floats(codes, scales, grad.dtype) if of_input else None,
            (grad.t() @ x).to(ctx.dtype) if of_weight else None,
            grad.sum(0) if of_bias else None,
            None,
            None,
            None,
        )


def _floats(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
