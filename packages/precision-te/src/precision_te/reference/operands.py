"""The operands of the three products: which matrix is quantised how, by recipe.

forward:          y  = x w^T     sums over in_features
input gradient:   dx = g w       sums over out_features
weight gradient:  dw = g^T x     sums over the rows of x, the tokens

Blocks lie along the axis that the product sums over, so that each matrix is quantised twice, each time from its
unquantised values, as the vendor does.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from precision_te.recipes import MXFP8, NVFP4, Block, Current, Delayed, Recipe
from precision_te.reference import scaling
from precision_te.reference.formats import FORMATS
from precision_te.reference.scaling import Quantized

Role = Literal["input", "weight", "grad"]


def quantize(
    x: Tensor, recipe: Recipe, role: Role, *, transposed: bool = False, scale: Tensor | None = None
) -> Quantized:
    """Returns `x` (rows, columns) or its transpose, quantised along its last axis.

    Args:
        role: the input of the layer, its weight, or the gradient of its output.
        transposed: quantises x^T: for the input gradient (weight) and the weight gradient (input, grad).
        scale: of delayed scaling, float32, one for the tensor.
    """
    format = FORMATS[recipe.grad_format if role == "grad" else recipe.forward_format]
    if isinstance(recipe, (Delayed, Current)):
        if isinstance(recipe, Current):
            limit = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)
            scale = scaling.scale_of(scaling.amax(x), format, power_of_2=recipe.use_power_2_scales, limit=limit)
        assert scale is not None
        return scaling.per_tensor(x.T if transposed else x, format, scale)
    matrix = x.T if transposed else x
    if isinstance(recipe, Block):
        dims = {"input": recipe.x_block_scaling_dim, "weight": recipe.w_block_scaling_dim}
        square = dims.get(role, recipe.grad_block_scaling_dim) == 2
        return scaling.blocks(matrix, format, (128 if square else 1, 128), power_of_2=not recipe.use_f32_scales)
    if isinstance(recipe, MXFP8):
        return scaling.mxfp8(matrix, format, (32 if role == "weight" and recipe.enable_2d_quantization else 1, 32))
    return _nvfp4(matrix, recipe, role, transposed)


def _nvfp4(matrix: Tensor, recipe: NVFP4, role: Role, transposed: bool) -> Quantized:
    if role == "weight":
        return scaling.nvfp4(matrix, (1 if recipe.disable_2d_quantization else 16, 16))
    if transposed and not recipe.disable_rht:  # the operands of the weight gradient
        matrix = scaling.hadamard(matrix)
    stochastic = role == "grad" and not recipe.disable_stochastic_rounding
    return scaling.nvfp4(matrix, (1, 16), stochastic=stochastic)
