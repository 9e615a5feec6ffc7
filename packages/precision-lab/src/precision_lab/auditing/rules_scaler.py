"""Rules about a gradient scaler: the order in which a loop scales, unscales, clips, steps and updates."""

from __future__ import annotations

from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.record import Record

_OURS = 'fabric.clip_gradients(model, optimizer, max_norm=1.0) under Fabric(precision="16-mixed") unscales first'


def clipped_while_scaled(record: Record) -> Iterator[Finding]:
    """Gradients that still carry the scale are changed: by clipping, in nearly every case."""
    factor, unscaled = 0.0, set[int]()
    for event in record.events:
        if event.kind == "backward":
            factor, unscaled = event.factor if event.scaled else 0.0, set()
        elif event.kind == "unscaled":
            unscaled |= set(event.ids)
        if event.kind != "gradients" or event.library in ("precision", "DeepSpeed") or not factor:
            continue
        if set(event.ids) <= unscaled or not any(name.startswith("clip_grad") for name in event.functions):
            continue
        yield Finding(
            "clipped-while-scaled",
            "error",
            f"gradients were clipped while they were {factor:,.0f} times too large",
            "the norm is that of scaled gradients, so nearly every step is cut to almost nothing, however small the "
            "gradients are",
            Remedy(
                torch="call scaler.unscale_(optimizer) between backward and clip_grad_norm_",
                ours=_OURS,
                lightning="fabric.clip_gradients(model, optimizer, max_norm=1.0) unscales first",
                accelerate="accelerator.clip_grad_norm_(model.parameters(), 1.0) unscales first",
                transformers="leave clipping to TrainingArguments(max_grad_norm=1.0)",
            ),
            line=event.line,
        )


RULES = (clipped_while_scaled,)
