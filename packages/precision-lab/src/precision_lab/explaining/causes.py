"""Which kind of mistake an operation made, by its name and its operands."""

from __future__ import annotations

from dataclasses import dataclass

from precision_lab.auditing.kinds import ATTENTION, CAST, LOSS, NORM, PRODUCTS, SOFTMAX, SUM
from precision_lab.explaining.numbers import end_of
from precision_lab.explaining.watched import BACKWARD, Went

_SLOPES = frozenset(
    [
        "sqrt",
        "rsqrt",
        "pow",
        "log",
        "log2",
        "log10",
        "div",
        "reciprocal",
        "norm",
        "linalg_vector_norm",
        "acos",
        "asin",
        "atan2",
    ]
)
_ARCS = ("acos", "asin")
IGNORED_LABELS = "no label counts, as all are ignore_index: the mean over none is 0 / 0."


@dataclass(frozen=True)
class Cause:
    """A class of causes, and a sentence for this one."""

    kind: str
    text: str
    remedy: str = ""  # of remedies.py: which operand to mend


def cause_of(went: Went) -> Cause:
    """Returns what an operation did wrong that gave a value that is not finite."""
    if went.took_labels:
        return Cause("bad data", "labels, or something else that the loss was given, were not finite.", "labels")
    wide = went.wide
    if wide is not None and wide.finite:
        return _overflow(went)
    if went.phase == BACKWARD:
        return _slope(went)
    name = went.name.rstrip("_")
    first = went.inputs[0] if went.inputs else None
    if went.kind is SOFTMAX and first is not None and first.infs:
        return Cause("softmax of -inf", "a row in which everything is masked (-inf): 0 / 0.", "softmax")
    if name.startswith("log") and went.kind is not SOFTMAX and first is not None:
        if went.output.nans:
            return Cause("log of a negative number", "there is no logarithm of a negative number.", "log")
        return Cause("log of zero", f"{first.zeros:.0%} of its operand is zero.", "log")
    if name in ("div", "reciprocal", "rsqrt", "true_divide"):
        if name == "rsqrt" and went.output.nans and not went.output.infs:
            return Cause("root of a negative number", "its operand is negative.", "root")
        return Cause("division by zero", "its denominator has zeros.", "root" if name == "rsqrt" else "division")
    if name == "sqrt":
        return Cause("root of a negative number", "its operand is negative.", "root")
    if name == "pow" and first is not None and first.zeros and any(each < 0 for each in went.scalars):
        return Cause("division by zero", "a negative power of zero.", "root")
    if name in ("exp", "expm1", "cosh", "sinh"):
        return Cause("overflow in exp", f"{_largest(went)}, and {name} ends at 709 in float64.", "exp")
    if name == "lift_fresh":
        return Cause("not finite before", "a constant, or a tensor from elsewhere, is not finite.", "")
    if went.inputs and not all(each.finite for each in went.inputs):
        return Cause("NaN from inf", "inf - inf, 0 x inf or inf / inf.", "")
    if name.startswith(("std", "var")):
        return Cause("division by zero", "the deviation of one value: n - 1 is zero.", "deviation")
    if name.startswith("nll_loss"):
        return Cause("bad data", IGNORED_LABELS, "ignored")
    if went.scalars and any(abs(each) == float("inf") for each in went.scalars):
        return Cause("NaN from inf", "an infinite constant in arithmetic: 0 x inf is NaN.", "")
    if went.output.infs and not went.output.nans:
        product = name in ("prod", "cumprod") or went.kind in PRODUCTS
        return Cause("overflow in a product" if product else "overflow", "its result is beyond float64, too.", "")
    return Cause("not finite", "its operands are finite, and in float64 it is not finite either.", "")


def _overflow(went: Went) -> Cause:
    dtype = went.output.dtype
    end = end_of(dtype)
    wide = went.wide
    assert wide is not None
    largest = f"in float64 it reaches {wide.largest:.4g}, and {dtype} ends at {end:.4g}."
    if wide.largest <= end:
        largest = f"in float64 it is finite (up to {wide.largest:.4g}): a sum within it leaves {dtype}'s range."
    name = went.name.rstrip("_")
    square = went.same or (name == "pow" and 2.0 in went.scalars)
    if went.phase == BACKWARD and name in ("div", "reciprocal", "pow") and went.forward.rstrip("_") in _SLOPES:
        return Cause("overflow in backward", f"the slope of {went.forward} at {_smallest(went)}: {largest}", "slope")
    if went.phase == BACKWARD:
        return Cause("overflow in backward", largest, "scale")
    if went.kind is CAST:
        return Cause("overflow in a cast", largest)
    if name in ("exp", "expm1", "cosh", "sinh"):
        return Cause("overflow in exp", f"{_largest(went)}; {largest}", "exp")
    if went.kind is ATTENTION:
        return Cause("overflow in attention", largest)
    if went.kind in PRODUCTS or name in ("prod", "cumprod"):
        return Cause("overflow in a product", largest)
    if square:
        return Cause("overflow in a square", largest)
    if went.kind in (SUM, NORM):
        return Cause("overflow in a sum", largest)
    if went.kind is LOSS:
        return Cause("overflow in the loss", largest)
    if name in ("div", "reciprocal", "rsqrt"):
        return Cause("division by a small number", f"{_smallest(went)}; {largest}", "division")
    return Cause("overflow", largest)


def _slope(went: Went) -> Cause:
    forward = went.forward.rstrip("_")
    if forward in _SLOPES or forward.lower() in _SLOPES:
        if forward in _ARCS:
            return Cause("infinite slope", f"the slope of {forward} at 1 and -1 is infinite.", "arc")
        text = f"the slope of {forward} at zero is infinite."
        kind = "log" if forward.startswith("log") else "division" if forward in ("div", "reciprocal") else "root"
        return Cause("infinite slope", text, kind)
    if went.inputs and not all(each.finite for each in went.inputs):
        return Cause("NaN from inf", "0 x inf: an infinity of the forward meets a gradient that is zero.", "")
    return Cause("not finite in backward", "its operands are finite, and in float64 it is not finite either.", "")


def _largest(went: Went) -> str:
    return f"its operand reaches {max((each.largest for each in went.inputs), default=0.0):.4g}"


def _smallest(went: Went) -> str:
    return f"{min((each.smallest for each in went.inputs if each.smallest), default=0.0):.3g}"
