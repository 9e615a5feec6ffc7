"""Rules about torch's switches for float32 products: TF32 on or off against what was asked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.kinds import CONV
from precision_lab.auditing.record import Event, Record

_PARTS = {"matmul": ("matmul",), "conv": ("conv",), "all": ("matmul", "conv")}
_SAYS = {"matmul": "matrix products", "conv": "convolutions"}
_ONCE = Remedy(
    torch='set torch.set_float32_matmul_precision("high") (TF32) or "highest" (float32) once, before the model is made',
    ours='set torch.set_float32_matmul_precision("high") or "highest" once, before fabric.setup',
    transformers="set TrainingArguments(tf32=True) or tf32=False, and no switch of torch beside it",
)
_BOTH = Remedy(
    torch='set both, before the model is made: torch.set_float32_matmul_precision("high") with '
    'torch.backends.cudnn.allow_tf32 = True, or "highest" with False',
    ours="the same, before fabric.setup: torch has one switch for products and one for convolutions",
    transformers="TrainingArguments(tf32=True) or tf32=False sets both",
)


def switched(record: Record) -> Iterator[Finding]:
    """A switch was set to one thing, then to another, or after the model had run."""
    ran = False
    last: dict[str, Event] = {}
    for event in record.events:
        ran |= event.kind == "forward" and bool(event.params)
        if event.kind != "switches":
            continue
        before = next((last[part] for part in _PARTS[event.of] if part in last), None)
        against = before is not None and before.tf32 != event.tf32
        late = ran and (before is None or against)
        if against or late:
            first = f"; {before.line} had asked for {_said(before)}" if against and before is not None else ""
            yield Finding(
                "tf32-switched",
                "warning" if "cuda" in record.devices else "info",
                f"{_said(event)} was set {'after the model had run' if late else 'later'}{first}",
                "products of float32 are computed with 10 bits of mantissa (TF32) before and with 23 after it, or the "
                f"other way round; which one counts depends on what runs when{_here(record)}",
                _ONCE,
                line=event.line,
            )
        last.update(dict.fromkeys(_PARTS[event.of], event))


def differs(record: Record) -> Iterator[Finding]:
    """TF32 was asked for in matrix products and not in convolutions, or the other way round, and both run."""
    last = {part: event for event in record.of("switches") for part in _PARTS[event.of]}
    convolves = any(op.kind == CONV and torch.float32 in op.inputs for op in record.ops)
    tf32 = {part: event.tf32 for part, event in last.items()}
    # torch's defaults: float32 in matrix products, TF32 in convolutions.
    tf32 = {"matmul": False, "conv": record.backends.get("cudnn_tf32", True), **tf32}
    if not last or not convolves or tf32["matmul"] == tf32["conv"]:
        return
    one, other = ("matmul", "conv") if tf32["matmul"] else ("conv", "matmul")
    event = list(last.values())[-1]
    default = "" if len(last) == 2 else ", which is torch's default"
    yield Finding(
        "tf32-differs",
        "info",
        f"{_said(event)}: {_SAYS[one]} run in TF32, and {_SAYS[other]} do not{default}",
        f"each of the two has a switch of its own: what is asked for one leaves the other as it was{_here(record)}",
        _BOTH,
        line=event.line,
    )


def _here(record: Record) -> str:
    return "" if "cuda" in record.devices else " (on a GPU; on this device TF32 does not exist)"


def _said(event: Event) -> str:
    return f"{event.name} = {event.value!r}"


RULES = (switched, differs)
