"""The graph of a loss that was computed outside of the model: the operation in it that first goes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from precision_lab.auditing.where import Line, Where
from precision_lab.explaining.causes import IGNORED_LABELS
from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.mends import IGNORED, LABELS, MENDS
from precision_lab.explaining.numbers import is_finite, numbers_of

_NODES = 2000
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "MseLoss": functional.mse_loss,
    "SmoothL1Loss": functional.smooth_l1_loss,
    "HuberLoss": functional.huber_loss,
    "SoftMarginLoss": functional.soft_margin_loss,
    "BinaryCrossEntropyWithLogits": functional.binary_cross_entropy_with_logits,
}
_LINES, _NEAR = 60, 16
"""Lines above backward that are looked at, and operations nearest to the loss whose names a line should have."""
_ONE = torch.ones(())
_OVERFLOWS = ("overflow in a square", "overflow in a product")
_MENDED = {
    "log of zero": "log",
    "log of a negative number": "log",
    "division by zero": "division",
    "root of a negative number": "root",
    "overflow in exp": "exp",
}
"""Kind of cause -> what of mends.py is for it."""
_CALLS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "Log": (torch.log, 1),
    "Log2": (torch.log2, 1),
    "Log10": (torch.log10, 1),
    "Div": (torch.div, 2),
}
"""Operations that keep all of their operands, and how many."""
_TEXTS = {
    "Div": r"/|\bdiv",
    "Reciprocal": r"/|reciprocal",
    "Mul": r"\*|\bmul",
    "Pow": r"\*\*|\bpow|square",
    "MseLoss": r"mse_?loss",
    "NllLoss": r"nll_?loss|\bcross_?entropy",
    "NllLoss2D": r"nll_?loss|\bcross_?entropy",
    "LogSoftmax": r"log_?softmax|\bcross_?entropy",
    "Neg": r"-",
    "Add": r"\+|\badd",
    "Sub": r"-|\bsub",
}
"""What the text of a line has where an operation is called, for those that have signs or several names."""
_INPUTS = ("_saved_self", "_saved_other", "_saved_target", "_saved_weight", "_saved_exponent")


def explain_loss(loss: Tensor, outputs: list[Tensor]) -> Explanation | None:
    """Returns the explanation for a loss that is not finite while the model's outputs are; None where it is finite."""
    if is_finite(loss):
        return None
    found = _explain(loss, outputs)
    found.line = _line(found.operation, [node.name().partition("Backward")[0] for node, _ in _nodes(loss)[:_NEAR]])
    if found.line is not None:
        found.notes.append("the line is the nearest above whose text has the operation: a graph keeps no lines")
    return found


def _explain(loss: Tensor, outputs: list[Tensor]) -> Explanation:
    """Walks from the loss down to the lowest operation with a saved value that is not finite, or that makes one."""
    nodes = _nodes(loss)
    found = Explanation("in the loss", "", "loss", reached="the loss")
    finite = "the model's outputs are finite, the loss is not" if outputs else "the loss is not finite"
    for node, saved in reversed(nodes):
        name = node.name().partition("Backward")[0]
        bad = {key: each for key, each in saved.items() if not is_finite(each)}
        for key, value in bad.items():
            if key == "_saved_target":
                found.kind, found.name = "bad data", "the labels"
                found.what = f"{finite}: {name} was given labels that are not finite ({numbers_of(value)})."
                found.remedies = _without(name, saved)
                return _with(found, node, name, saved)
        if name.startswith("NllLoss") and float(saved.get("_saved_total_weight", _ONE)) == 0:
            found.kind, found.name, found.what = "bad data", "the labels", f"{finite}: {name}: {IGNORED_LABELS}"
            found.remedies = [Remedy("code", IGNORED, IGNORED, "finite: a sum over none is 0")]
            return _with(found, node, name, {})
        if (text := _trouble(name, saved)) is not None:
            found.what = f"{finite}: {name}: {text}"
            found.kind = text.partition(":")[0]
            found.remedies = _mended(found.kind, name, saved)
            return _with(found, node, name, saved)
        if bad and not any(key in _INPUTS for key in bad):
            found.what = f"{finite}: {name} made it so."
            return _with(found, node, name, saved)
    lowest = next(
        (node for node, saved in reversed(nodes) if any(not is_finite(each) for each in saved.values())), None
    )
    name = lowest.name().partition("Backward")[0] if lowest is not None else "an operation whose values are not kept"
    found.what = f"{finite}: {name} is where it first shows. Give loss= as a function to know more."
    found.operation = name if lowest is not None else ""
    return found


def _without(name: str, saved: dict[str, Tensor]) -> list[Remedy]:
    remedy = Remedy("data", LABELS, LABELS)
    function, own = _LOSSES.get(name), saved.get("_saved_self")
    if function is not None and own is not None:
        labels = torch.nan_to_num(saved["_saved_target"], 0.0, 0.0, 0.0)
        remedy.outcome = "finite" if is_finite(function(own, labels.to(own.dtype))) else "not finite"
    return [remedy]


def _mended(kind: str, name: str, saved: dict[str, Tensor]) -> list[Remedy]:
    """Returns what mends an operation of the loss, tried on what the graph has kept of its operands."""
    own, other = saved.get("_saved_self"), saved.get("_saved_other")
    if kind in _OVERFLOWS and own is not None and own.dtype in (torch.float16, torch.bfloat16):
        text = "the loss of output.float(), outside of autocast"
        finite = _trouble(name, {key: each.float() for key, each in saved.items()}) is None
        return [Remedy("code", text, text, "finite: the operation alone, in float32" if finite else "not finite")]
    if kind not in _MENDED:
        return []
    _, text, mend = MENDS[_MENDED[kind]]
    operands = tuple(each for each in (own, other) if each is not None)
    call = _CALLS.get(name)
    outcome = "not tried"
    if call is not None and len(operands) == call[1]:
        arguments, _ = mend(operands, {})
        outcome = "finite: the operation alone, on its operands" if is_finite(call[0](*arguments)) else "not finite"
    return [Remedy("code", text, text, outcome)]


def _with(found: Explanation, node: Any, name: str, saved: dict[str, Tensor]) -> Explanation:
    found.operation = name
    found.operands = [numbers_of(each) for each in saved.values() if each.is_floating_point()]
    return found


def _trouble(name: str, saved: dict[str, Tensor]) -> str | None:
    """Returns what an operation does wrong with its saved operands, while they are finite."""
    own, other = saved.get("_saved_self"), saved.get("_saved_other")
    if not all(is_finite(each) for key, each in saved.items() if key in _INPUTS):
        return None
    if name in ("Log", "Log2", "Log10", "Logarithm") and own is not None and bool((own <= 0).any()):
        return "log of zero: " + str(numbers_of(own)) if bool((own == 0).any()) else "log of a negative number"
    if name == "Div" and other is not None and bool((other == 0).any()):
        return f"division by zero: {numbers_of(other)}"
    if name == "Sqrt" and (result := saved.get("_saved_result")) is not None and bool(result.isnan().any()):
        return "root of a negative number: its result is NaN"
    result = saved.get("_saved_result")
    if name == "Reciprocal" and result is not None and bool(result.isinf().any()):
        return "division by zero: its result is inf"
    if name in ("Exp", "Expm1") and result is not None and not is_finite(result):
        return f"overflow in exp: the result ends at {torch.finfo(result.dtype).max:.4g}"
    if own is not None and own.is_floating_point() and name in ("Pow", "Mul", "MseLoss", "SmoothL1Loss", "HuberLoss"):
        wide = own.detach().double()
        with_ = other if other is not None else saved.get("_saved_target")
        product = wide * wide if with_ is None else wide * with_ if name == "Mul" else (wide - with_.double()) ** 2
        if float(product.abs().max()) > torch.finfo(own.dtype).max:
            return (
                f"overflow in a square: it reaches {float(product.abs().max()):.4g}"
                if name != "Mul"
                else (f"overflow in a product: it reaches {float(product.abs().max()):.4g}")
            )
    return None


def _line(operation: str, near: list[str]) -> Line | None:
    """Returns the line above the caller's own, at most so many, whose text has the operation; autograd keeps none.

    Of several it is the one that has most of the operations around it, the nearest of equal ones.
    """
    here = Where().line(2)
    if here is None or not operation:
        return None
    best: tuple[int, Line | None] = (-1, None)
    for number in range(here.number, max(here.number - _LINES, 0), -1):
        line = Line(here.file, number, here.function)
        code = line.text.partition("#")[0]
        if not code or code.startswith("def ") or not re.search(_pattern(operation), code, re.IGNORECASE):
            continue
        score = sum(bool(re.search(_pattern(name), code, re.IGNORECASE)) for name in set(near))
        if score > best[0]:
            best = score, line
    return best[1]


def _pattern(operation: str) -> str:
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
    return _TEXTS.get(operation, rf"\b{snake}\(|{operation}\(")


def _nodes(loss: Tensor) -> list[tuple[Any, dict[str, Tensor]]]:
    """Returns the nodes nearest to the loss, in order, with what they saved, as far as backward has not freed it."""
    found: list[tuple[Any, dict[str, Tensor]]] = []
    seen: set[Any] = set()
    waiting = [loss.grad_fn] if loss.grad_fn is not None else []
    while waiting and len(seen) < _NODES:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        waiting += [each for each, _ in node.next_functions if each is not None]
        saved: dict[str, Tensor] = {}
        for key in dir(node):
            if key.startswith("_saved_"):
                try:
                    value = getattr(node, key)
                except RuntimeError:  # freed by backward, or changed in place
                    continue
                if isinstance(value, Tensor) and _is_there(value):
                    saved[key] = value.detach()
        found.append((node, saved))
    return found


def _is_there(tensor: Tensor) -> bool:
    """Whether it has its storage still: gathered weights are given back after a forward."""
    try:
        return not tensor.numel() or tensor.untyped_storage().nbytes() > 0
    except (RuntimeError, NotImplementedError):
        return False
