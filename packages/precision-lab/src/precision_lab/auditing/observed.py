"""What was observed, in the words of a precision policy: which mode of ours a loop really trains in."""

from __future__ import annotations

import math

import torch

from precision_core import MODES, Policy
from precision_lab.auditing.kinds import PRODUCTS
from precision_lab.auditing.ledger import short
from precision_lab.auditing.record import FORWARD, Record

FIELDS = ("params", "compute", "reduce", "output", "buffers", "master", "state", "grads", "scale")
"""The fields of `precision_core.Policy` that show. How values are rounded does not."""

_FEW = 0.01
"""A dtype that has a smaller share of a field's bytes is left out."""


def observed(record: Record) -> dict[str, list[str]]:
    """Returns field -> what it was seen to be, most bytes first; a field of which nothing was seen is left out."""
    seen: dict[str, dict[str, float]] = {}

    def add(field: str, value: torch.dtype | str, size: float) -> None:
        name = value if isinstance(value, str) else short(value)
        row = seen.setdefault(field, {})
        row[name] = row.get(name, 0.0) + size

    kinds = {"params": "params", "buffers": "buffers", "grads": "grads", "state": "state"}
    trained = {each.name for each in record.stored if each.kind == "params"}
    halves = any(each.dtype.itemsize < 4 for each in record.stored if each.kind == "params")
    for each in record.stored:
        if each.kind == "grads" and each.name not in trained:
            continue  # of an engine's copies: what gradients are accumulated in is not what they are stepped in
        if each.kind in kinds and each.dtype.is_floating_point:
            add(kinds[each.kind], each.dtype, each.bytes)
        elif each.kind == "master" and (each.key != "param" or halves):
            # What is kept beside a bfloat16 weight is the other half of its float32 value.
            add("master", "float32" if each.dtype is torch.int16 else each.dtype, each.bytes)
    if "state" in seen and "master" not in seen:
        add("master", "none", 1.0)
    for op in record.ops:
        if op.kind in PRODUCTS and op.phase == FORWARD and op.inputs and op.inputs[-1].is_floating_point:
            add("compute", op.inputs[-1], op.bytes)
    for event in record.of("reduce"):
        if event.phase != FORWARD and event.elements > 1:  # engines reduce in backward, after it, or in the step
            add("reduce", event.dtype, event.elements * event.dtype.itemsize)
    for event in record.of("forward"):
        if event.grad and event.params:
            for dtype in event.outputs:
                if dtype.is_floating_point:
                    add("output", dtype, 1.0)
    for event in record.of("backward"):
        # A large power of two is a scale of an engine's, anything else a weight of the loss.
        scaled = event.scaler is not None or (abs(event.factor) >= 128 and math.frexp(event.factor)[0] == 0.5)
        add("scale", "true" if scaled else "false", 1.0)
    return {
        field: [
            name for name, size in sorted(seen[field].items(), key=lambda each: -each[1]) if size > _total(seen[field])
        ]
        for field in FIELDS
        if field in seen
    }


def _total(row: dict[str, float]) -> float:
    return _FEW * sum(row.values())


def named(fields: dict[str, list[str]]) -> str | None:
    """Returns the mode of ours that keeps and computes all fields in the same dtypes; None: no mode does."""
    for name, policy in MODES.items():
        if fields and all(_is(field, seen, policy) for field, seen in fields.items()):
            return name
    return None


def _is(field: str, seen: list[str], policy: Policy) -> bool:
    expected = _value(getattr(policy, field))
    # Tables of positions and running statistics stay float32 in our half modes, too.
    return set(seen) <= {expected, "float32"} if field == "buffers" else seen == [expected]


def _value(value: torch.dtype | bool | None) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else short(value)


def sentence(record: Record) -> str:
    """Returns one sentence that says in which precision the loop trains; empty where too little was seen."""
    fields = observed(record)
    if "compute" not in fields or "params" not in fields:
        return ""
    name = named(fields)
    if name is not None:
        return f'This trains as precision="{name}" does.'
    spelled = ", ".join(f"{field} {' and '.join(fields[field])}" for field in FIELDS if field in fields)
    return f"No mode of ours trains like this: {spelled}."
