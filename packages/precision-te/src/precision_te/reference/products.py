"""The three products of a linear layer, each of two quantised operands, accumulated in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from precision_te.recipes import Recipe
from precision_te.reference import operands
from precision_te.reference.amax import COLUMNS, AmaxState
from precision_te.reference.operands import Role
from precision_te.reference.recompute import Run
from precision_te.reference.region import Region
from precision_te.reference.scaling import Quantized


@dataclass(frozen=True)
class Scales:
    """Where delayed scaling's scales come from; other recipes have none.

    `forward` (3,) are those at the time of the forward, with which backward quantises input and weight once more.
    """

    region: Region
    state: AmaxState
    forward: Tensor

    def of(self, role: Role) -> Tensor:
        """Returns the scale of an operand, now; that of the gradient is chosen when the gradient is there."""
        return (self.state.scale if role == "grad" else self.forward)[COLUMNS[role]].clone()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, scales: Scales | None, run: Run | None = None
) -> Tensor:
    """Returns x W^T + bias for `x` (rows, in), in the dtype of `x`; gradients have the dtypes of what they are of.

    Weight and bias may be wider than `x`: the weight is quantised from its own values. The graph keeps `run`
    alive, and backward sets its `done`.
    """
    result: Tensor = _Linear.apply(x, weight, bias, recipe, scales, run)  # type: ignore[no-untyped-call]
    return result


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, scales: Scales | None, run: Run | None
    ) -> Tensor:
        ctx.recipe, ctx.scales, ctx.run = recipe, scales, run
        ctx.bias_dtype = None if bias is None else bias.dtype
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.weight_dtype = weight.dtype
        a, b = _quantized(ctx, x, "input"), _quantized(ctx, weight, "weight")
        result = a.product(b)
        if bias is not None:
            result += bias.to(x.dtype)
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if ctx.run is not None:
            ctx.run.done = True  # not before: under a checkpoint, the line above runs the forward again
        scales: Scales | None = ctx.scales
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        override = getattr(ctx.recipe, "backward_override", None)
        if override is not None:
            of_input, of_weights = _unquantized(ctx, grad, x, weight, override)
        else:
            of_input = of_weights = None
            if scales is not None:
                scales.state.record("grad", grad)
            if of_x:
                of_input = _quantized(ctx, grad, "grad").product(_quantized(ctx, weight, "weight", True))
            if of_weight:
                of_weights = _quantized(ctx, grad, "grad", True).product(_quantized(ctx, x, "input", True))
            if scales is not None:
                scales.region.ran_backward(scales.state)
        return (
            None if of_input is None else of_input.to(grad.dtype),
            None if of_weights is None else of_weights.to(grad.dtype).to(ctx.weight_dtype),
            grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype) if of_bias else None,
            None,
            None,
            None,
        )


def _quantized(ctx: Any, x: Tensor, role: Role, transposed: bool = False) -> Quantized:
    scale = None if ctx.scales is None else ctx.scales.of(role)
    return operands.quantize(x, ctx.recipe, role, transposed=transposed, scale=scale)


def _unquantized(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor | None, override: str
) -> tuple[Tensor | None, Tensor | None]:
    """The vendor's `backward_override`: gradients are not quantised, the others as in forward or not at all."""

    def operand(y: Tensor, role: Role) -> Tensor:
        y = _quantized(ctx, y, role).dequantize() if override == "dequantized" else y
        return y.to(grad.dtype).float()

    g = grad.float()
    return (
        None if weight is None else g @ operand(weight, "weight"),
        None if x is None else g.T @ operand(x, "input"),
    )
