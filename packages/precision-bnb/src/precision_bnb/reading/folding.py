"""Conditions that settings decide: `self.config.pretraining_tp > 1` is what it is for as long as the model lives."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

Plain = (bool, int, float, str, type(None))

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def folded(test: ast.expr, plain: Callable[[ast.expr], list[Any]]) -> bool | None:
    """Returns what a condition comes to, None where that is not known.

    `plain` gives the value of a name or attribute as a list of one, an empty list where it may change.
    """
    values = _value(test, plain)
    return bool(values[0]) if values else None


def _value(node: ast.expr, plain: Callable[[ast.expr], list[Any]]) -> list[Any]:
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [not value for value in _value(node.operand, plain)]
    if isinstance(node, ast.BoolOp):
        return _of_several(node, plain)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = _value(node.left, plain), _value(node.comparators[0], plain)
        try:
            return [_COMPARE[type(node.ops[0])](left[0], right[0])] if left and right else []
        except TypeError:
            return []
    return plain(node)


def _of_several(node: ast.BoolOp, plain: Callable[[ast.expr], list[Any]]) -> list[Any]:
    decides = not isinstance(node.op, ast.And)  # one True decides `or`, one False decides `and`
    parts = [folded(part, plain) for part in node.values]
    if decides in parts:
        return [decides]
    return [] if None in parts else [not decides]
