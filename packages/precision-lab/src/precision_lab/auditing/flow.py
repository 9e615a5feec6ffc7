"""Where results in float32 come from: constants that promote half activations, and what is computed from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from precision_lab.auditing.kinds import CAST, LOSS, NORM, OTHER, PRODUCTS, SOFTMAX, SUM
from precision_lab.auditing.record import Op

_HALVES = (torch.bfloat16, torch.float16)
_STORED_SMALL = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_FOLLOWED = (OTHER, SUM, *PRODUCTS)
"""Kinds after which a result still comes from a promotion: not norms, softmaxes and losses, which autocast, and a
careful author, compute in float32."""

_EXACT = frozenset(
    ["pow", "exp", "expm1", "log", "log1p", "log2", "sqrt", "reciprocal", "cos", "sin", "atan2", "erfinv"]
)
"""Operations whose operand was cast to float32 for a reason."""


class Flow:
    """Follows tensors through the operations of modules' forwards."""

    def __init__(self) -> None:
        self._kept: set[int] = set()  # ids of the models' buffers, and of other tensors that modules hold
        self._constant: Any = WeakIdKeyDictionary()  # made in forward of nothing that a batch or a gradient is in
        self._origin: Any = WeakIdKeyDictionary()  # float32 -> the row of the promotion, or cast, that it comes from
        self._cast: Any = WeakIdKeyDictionary()  # float32, just cast from half -> the row of the cast

    def begin(self, roots: list[nn.Module]) -> None:
        """Called before a model's forward: reads which tensors modules hold."""
        self._kept = {
            id(each)
            for root in roots
            for module in root.modules()
            for each in (*module._buffers.values(), *vars(module).values())
            if isinstance(each, Tensor) and not each.requires_grad
        }

    def follow(self, func: Any, row: Op, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Notes in `row` what its operands say, and passes it on to the outputs."""
        is_new = row.name == "lift_fresh" or row.name.startswith("new_") or row.name.endswith("_like")
        if is_new or all(self._is_constant(each) for each in inputs):
            self.made(outputs)
        if not outputs or not outputs[0].is_floating_point():
            return
        wide = [each for each in inputs if each.dtype is torch.float32 and each.dim()]
        for each in wide:
            if each in self._cast and not func.is_view:
                self._follow_use(self._cast[each], row, outputs)
        if row.kind is CAST and inputs:
            self._follow_cast(row, inputs[0], outputs[0])
        elif outputs[0].dtype is torch.float32 and row.kind in _FOLLOWED:
            if wide and row.kind is OTHER and any(each.dtype in _HALVES and each.dim() for each in inputs):
                # Under autocast batches and parameters are float32, and so is what they are added to. Of a half model
                # nothing is to be: what has no gradient, or is a parameter, was left out of its cast.
                left = not row.autocast and all(
                    not each.requires_grad or isinstance(each, nn.Parameter) for each in wide
                )
                constant = left or all(self._is_constant(each) for each in wide)
                row.promoted = "constant" if constant else row.promoted or "other"
                for each in wide:  # half is added to it: it is the stream of residuals, which is float32 under autocast
                    if row.name.startswith("add") and each in self._origin:
                        self._origin[each].meant = True
                if row.promoted == "constant":
                    self._pass_on(row, outputs)
                return
            marked = [each for each in wide if each in self._origin and each not in self._cast]
            if marked and all(each in self._origin or self._is_constant(each) for each in wide):
                origin = self._origin[marked[0]]
                if not func.is_view:
                    origin.after_bytes += outputs[0].numel() * outputs[0].element_size()
                    origin.after_modules.add(row.module)
                self._pass_on(origin, outputs)
            if func.is_view and inputs and inputs[0] in self._cast:
                for output in outputs:
                    self._cast[output] = self._cast[inputs[0]]

    def made(self, outputs: list[Tensor]) -> None:
        """Takes what was made of no tensor within a forward."""
        for output in outputs:
            self._constant[output] = True

    def _follow_use(self, cast: Op, row: Op, outputs: list[Tensor]) -> None:
        """Notes what is done with a tensor that was cast to float32."""
        if row.kind in (NORM, SOFTMAX, LOSS, SUM, *PRODUCTS) or row.name in _EXACT:
            cast.meant = True
        elif row.kind is OTHER and outputs[0].dtype is torch.float32:
            cast.promoted = "cast"
            self._pass_on(cast, outputs)
            cast.after_bytes += outputs[0].numel() * outputs[0].element_size()
            cast.after_modules.add(row.module)

    def _follow_cast(self, row: Op, value: Tensor, output: Tensor) -> None:
        if value.dtype in _STORED_SMALL and value.dim() > 1:
            if row.via or isinstance(value, nn.Parameter) or self._is_kept(value):
                row.promoted = "quantised"
            return
        if value.dtype in _HALVES and output.dtype is torch.float32 and not isinstance(value, nn.Parameter):
            self._cast[output] = row
        elif output.dtype in _HALVES and value in self._cast:
            self._cast[value].back += value.numel() * value.element_size()

    def _pass_on(self, origin: Op, outputs: list[Tensor]) -> None:
        for output in outputs:
            self._origin[output] = origin

    def _is_constant(self, tensor: Tensor) -> bool:
        if tensor in self._constant:
            return True
        if tensor.requires_grad or isinstance(tensor, nn.Parameter):
            return False
        return self._is_kept(tensor)

    def _is_kept(self, tensor: Tensor) -> bool:
        return id(tensor if tensor._base is None else tensor._base) in self._kept
