"""Rules about scaled gradients: what happens to them between backward and step, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import near, replay

_OURS = 'fabric.clip_gradients(model, optimizer, max_norm=1.0) under Fabric(precision="16-mixed") unscales first'
CLIP = Remedy(
    torch="call scaler.unscale_(optimizer), of each optimizer whose gradients are clipped, after the last backward and "
    "before the clipping; scaler.step(optimizer) sees that it was done",
    ours=_OURS,
    lightning="fabric.clip_gradients(model, optimizer, max_norm=1.0) unscales first; "
    "Trainer(gradient_clip_val=1.0) does so by itself",
    trainer="Trainer(gradient_clip_val=1.0), or clip in configure_gradient_clipping or on_before_optimizer_step: these "
    "get unscaled gradients, on_after_backward scaled ones",
    deepspeed='"gradient_clipping": 1.0 in the config of the engine',
    accelerate="accelerator.clip_grad_norm_(model.parameters(), 1.0) unscales first",
    transformers="leave clipping to TrainingArguments(max_grad_norm=1.0)",
)
_CHANGE = Remedy(
    torch="call scaler.unscale_(optimizer) after the last backward, then change the gradients",
    ours="fabric.clip_gradients(model, optimizer, max_norm=float('inf')) unscales; change the gradients after it",
    accelerate="call accelerator.unscale_gradients() first",
    trainer="change the gradients in on_before_optimizer_step: there they are unscaled",
)
_REASONS = {
    "nan_to_num": "the scaler skips a step whose gradients are inf or NaN, and now never sees any: steps that should "
    "be "
    "skipped are taken",
    "clamp": "the bound holds for the scaled gradients, not for the gradients",
    "add": "what is added is divided by the scale afterwards, with the gradients",
}


def clipped_while_scaled(record: Record) -> Iterator[Finding]:
    """Gradients that still carry the scale are clipped, by torch's functions or by hand."""
    read = set[int]()  # ids whose norm, or another number of them, was read since the last backward
    for moment in replay(record):
        event = moment.event
        if event.kind == "backward":
            read.clear()
        elif event.kind == "gradients_read":
            read |= set(event.ids)
        if event.kind != "gradients" or not (ids := moment.scaled()):
            continue
        factor = max(moment.carried[each].factor for each in ids)
        how = _clips(event, read)
        if not how or (event.limit is not None and event.limit >= factor / 10):  # the bound was scaled, too
            continue
        part = "" if len(ids) == len(event.ids) else f"{len(ids)} of {len(event.ids)} "
        yield Finding(
            "clipped-while-scaled",
            "error",
            f"{part}gradients were clipped while they were {factor:,.0f} times too large",
            "the norm, or each value, is that of scaled gradients, so nearly every step is cut to almost nothing, "
            "however "
            "small the gradients are",
            CLIP,
            line=event.line,
            sure=how,
        )


def _clips(event: Event, read: set[int]) -> str:
    """Returns how sure it is that this is clipping; empty: it is not."""
    if any(name.startswith("clip_grad") for name in event.functions):
        return "certain"
    name = event.how.removeprefix("_foreach_").rstrip("_")
    if name in ("clamp", "clip", "clamp_min", "clamp_max"):
        return "certain"
    if name not in ("mul", "div"):
        return ""
    if event.computed:
        return "certain" if event.degree else ""  # one that is the same at each scale does no harm
    if event.by is None or not 0 <= event.by < 0.99 or not set(event.ids) & read:
        return ""
    if event.by == 0:  # of a norm that overflowed
        return "likely"
    inverse = 1 / event.by
    return "" if abs(inverse - round(inverse)) < 1e-6 * inverse else "likely"  # a mean over micro-batches


def changed_while_scaled(record: Record) -> Iterator[Finding]:
    """Something that is not a gradient is added to scaled ones, or their inf and NaN are removed."""
    for moment in replay(record):
        event = moment.event
        if event.kind != "gradients" or event.computed or not (ids := moment.scaled()):
            continue
        name = event.how.removeprefix("_foreach_").rstrip("_").replace("sub", "add").replace("addcmul", "add")
        if name not in ("nan_to_num", "add") or (name == "add" and not event.others):
            continue
        factor = max(moment.carried[each].factor for each in ids)
        yield Finding(
            "changed-while-scaled",
            "warning",
            f"gradients were changed ({event.how}) while they were {factor:,.0f} times too large",
            _REASONS[name],
            _CHANGE,
            line=event.line,
        )


def unscaled_twice(record: Record) -> Iterator[Finding]:
    """Gradients without a scale are divided by one: they were unscaled before, or never scaled."""
    last: dict[tuple[int, int], Event] = {}  # scaler and optimizer -> the unscale since its step or update
    for moment in replay(record):
        event = moment.event
        if event.kind == "unscale" and not event.within:
            if event.ran is None and (event.scaler, event.optimizer) in last:
                yield _twice(event, last[event.scaler, event.optimizer], "torch raises a RuntimeError here")
            last[event.scaler, event.optimizer] = event
        elif event.kind == "scaler_step" and event.ran is not None:
            last.pop((event.scaler, event.optimizer), None)
        elif event.kind == "scaler_update":
            last = {key: value for key, value in last.items() if key[0] != event.scaler}
        inverse = _inverse(event)
        if inverse is None or inverse > 0.5:
            continue
        for each in event.ids:
            carried = moment.carried.get(each)
            if carried is None or carried.scale < 2 or not near(carried.factor, 1.0):
                continue
            if event.kind == "gradients" and not near(inverse * carried.scale, 1.0):
                continue
            yield _twice(event, carried.by, f"they are {1 / inverse:,.0f} times too small")
            break


def _inverse(event: Event) -> float | None:
    if event.kind == "unscaled":
        return float(event.inverse)
    if event.kind == "step" and event.grad_scale:
        return 1 / float(event.grad_scale)
    return event.by if event.kind == "gradients" else None


def _twice(event: Event, before: Event | None, effect: str) -> Finding:
    first = f", which {before.line} had done" if before is not None and before.line not in (None, event.line) else ""
    return Finding(
        "unscaled-twice",
        "error",
        f"gradients were unscaled a second time{first}",
        f"the scale is to be taken off once in a step: {effect}",
        Remedy(
            torch="unscale by scaler.unscale_(optimizer), once in a step and never by hand: scaler.step(optimizer) "
            "knows "
            "of it and does not unscale again",
            ours="fabric.clip_gradients and optimizer.step() under Fabric unscale once, whichever comes first",
            lightning="fabric.clip_gradients and the optimizer that fabric.setup returned unscale once; divide by no "
            "scale yourself",
            trainer="the Trainer unscales before on_before_optimizer_step; divide by no scale yourself",
            accelerate="accelerator.clip_grad_norm_ and accelerator.unscale_gradients unscale once; divide by no scale "
            "yourself",
        ),
        line=event.line,
    )


RULES = (clipped_while_scaled, changed_while_scaled, unscaled_twice)
