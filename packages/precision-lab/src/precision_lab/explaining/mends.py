"""Operands that make an operation finite, and what to write for it: eps in a root, a logarithm, a denominator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from precision_lab.explaining.numbers import words

LABELS = "leave such batches out: if not torch.isfinite(labels).all(): continue"

IGNORED = 'reduction="sum", divided by the number of labels that count, at least 1'


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def mend(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs

    return mend


def _denominator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [number for number, each in enumerate(args) if isinstance(each, Tensor) and each.is_floating_point()]
    if not tensors:
        return args, kwargs
    # The last operand is divided by; Python's reflected 1 / x has x first, and a number last.
    at = tensors[-1]
    value = args[at]
    mended = torch.where(value.abs() < _eps(value), _eps(value), value)
    return (*args[:at], mended, *args[at + 1 :]), kwargs


def _below_the_end(value: Tensor) -> Tensor:
    end = math.log(torch.finfo(value.dtype).max) / 2
    return value.clamp(-end, end)


def _by_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A deviation that divides by the number of values, not by one less."""
    given = tuple(each for each in args if not isinstance(each, bool))
    return given, {**{key: value for key, value in kwargs.items() if key != "unbiased"}, "correction": 0}


def _summed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = args[:6] if len(args) > 6 else args  # reduction is the seventh
    return given, {**kwargs, "reduction": "sum"}


def _cleaned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def clean(value: Any) -> Any:
        given = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        return torch.nan_to_num(value, 0.0, 0.0, 0.0) if given else value

    return tuple(map(clean, args)), {key: clean(value) for key, value in kwargs.items()}


MENDS: dict[str, tuple[frozenset[str], str, Any]] = {
    "log": (
        frozenset(["log", "log2", "log10", "log_"]),
        "torch.log(x.clamp_min(torch.finfo(x.dtype).eps))",
        _first(lambda value: value.clamp_min(_eps(value))),
    ),
    "division": (
        frozenset(
            [
                "div",
                "div_",
                "divide",
                "true_divide",
                "__truediv__",
                "__rtruediv__",
                "__itruediv__",
                "__rdiv__",
                "reciprocal",
            ]
        ),
        "a denominator that is not zero: a / (b + eps), or b.clamp_min(eps)",
        _denominator,
    ),
    "root": (
        words("sqrt rsqrt sqrt_ pow __pow__ float_power norm linalg_norm vector_norm"),
        "eps within the root: torch.sqrt(x + eps), torch.rsqrt(x + eps)",
        _first(lambda value: value.clamp_min(0) + _eps(value)),
    ),
    "exp": (
        frozenset(["exp", "exp_", "expm1", "cosh", "sinh"]),
        "exp of differences: torch.exp(x - x.amax(-1, keepdim=True)), or torch.logsumexp; or clamp x",
        _first(_below_the_end),
    ),
    "softmax": (
        frozenset(["softmax", "log_softmax"]),
        "torch.finfo(x.dtype).min in place of -inf in the mask, or no row that is masked entirely",
        _first(lambda value: value.clamp_min(torch.finfo(value.dtype).min)),
    ),
}
MENDS["slope"] = (
    MENDS["root"][0] | MENDS["log"][0] | MENDS["division"][0],
    "eps within the root, the logarithm or the denominator",
    _first(lambda value: value.clamp_min(0) + _eps(value)),
)
MENDS["deviation"] = (
    words("std var std_mean var_mean"),
    "correction=0 where there is one value alone: x.std(correction=0)",
    _by_count,
)
MENDS["arc"] = (
    words("acos asin arccos arcsin acos_ asin_"),
    "x.clamp(-1 + eps, 1 - eps)",
    _first(lambda value: value.clamp(-1 + _eps(value), 1 - _eps(value))),
)
MENDS["ignored"] = (words("cross_entropy nll_loss"), IGNORED, _summed)
MENDS["labels"] = (frozenset(), LABELS, _cleaned)
