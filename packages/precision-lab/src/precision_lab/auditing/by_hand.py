"""Norms and softmaxes that a module computes by hand, followed from one operation in half to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from precision_lab.auditing.record import Op

_HALVES = (torch.bfloat16, torch.float16)
_PASSING = frozenset(["add", "add_", "sub", "clamp", "clamp_", "clamp_min", "maximum", "masked_fill", "where", "mul_"])
_PASSING |= {"view", "unsqueeze", "squeeze", "expand", "detach", "alias", "clone", "masked_fill_"}
"""Operations after which a tensor still is what it was: a small number was added, elements were masked."""
_NEXT = {
    ("square", "mean"): "mean", ("square", "sum"): "mean", ("mean", "div"): "mean", ("exp", "sum"): "sum",
    ("exp", "mul"): "exp", ("exp", "cumsum"): "sum", ("mean", "mean"): "mean",
}  # fmt: skip
_DIVISORS = {"sum": "softmax", "deviation": "norm", "norm": "norm"}
"""What a division by it makes."""


class ByHand:
    """What half tensors are: squares, their mean, norms, exponentials, their sum."""

    def __init__(self) -> None:
        self._what: Any = WeakIdKeyDictionary()  # tensor -> what it is, and the row where that began

    def follow(self, row: Op, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Passes on what the inputs are; where it ends as a norm or softmax, says so in the row where it began."""
        name, output = row.name, outputs[0] if outputs else None
        if output is None or output.dtype not in _HALVES or not inputs or inputs[0].dtype not in _HALVES:
            return
        if name == "pow" and self._what.get(inputs[0], ("",))[0] == "mean":  # to the power of -1/2
            self._what[inputs[0]][1].by_hand = "norm"
        elif name == "pow" or (name == "mul" and len(inputs) > 1 and inputs[0] is inputs[1]):
            self._what[output] = "square", row
        elif name in ("var", "std"):
            self._what[output] = ("mean" if name == "var" else "deviation"), row
        elif name == "var_mean":
            self._what[output] = "mean", row
        elif name == "linalg_vector_norm":
            self._what[output] = "norm", row
        elif name in ("exp", "exp_"):
            self._what[output] = "exp", row
        else:
            self._follow_on(row, inputs, output)

    def _follow_on(self, row: Op, inputs: list[Tensor], output: Tensor) -> None:
        name = row.name
        divisor = self._what.get(inputs[1]) if name in ("div", "div_") and len(inputs) > 1 else None
        if divisor is not None and divisor[0] in _DIVISORS and inputs[1].dim():
            divisor[1].by_hand = _DIVISORS[divisor[0]]
            return
        what, began = next((self._what[each] for each in inputs if each in self._what), ("", row))
        if not what:
            return
        if what == "mean" and name in ("rsqrt", "sqrt"):
            began.by_hand = "norm"
        elif (what == "sum" and name in ("log", "reciprocal")) or (what == "norm" and name == "reciprocal"):
            began.by_hand = _DIVISORS[what]
        elif (what, name) in _NEXT:
            self._what[output] = _NEXT[what, name], began
        elif name in _PASSING and inputs[0] in self._what and what != "square":
            self._what[output] = what, began
