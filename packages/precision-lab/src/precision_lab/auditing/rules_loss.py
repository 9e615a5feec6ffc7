"""Rules about the loss scale: a loss that needs one and has none, one that nobody takes off, one without a use."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import ENGINES, hand_scales, name_of, replay

_SCALE = Remedy(
    torch='make scaler = torch.amp.GradScaler(device), of the device that the model is on ("cpu" works, too), and '
    "use it "
    "in each step: scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update(). Or take torch.bfloat16, "
    "which "
    "needs no scale",
    ours='Fabric(precision="16-mixed"): fabric.backward(loss) scales, on every device; or precision="bf16-mixed"',
    lightning='Fabric(precision="16-mixed") and fabric.backward(loss); Trainer(precision="16-mixed") scales by itself',
    trainer='Trainer(precision="16-mixed") scales by itself; under manual optimization call '
    "self.manual_backward(loss) in place of loss.backward()",
    deepspeed='engine.backward(loss) in place of loss.backward(): with "fp16": {"enabled": true} the engine scales',
    accelerate='Accelerator(mixed_precision="fp16") and accelerator.backward(loss) in place of loss.backward()',
    transformers="TrainingArguments(fp16=True) scales by itself; or bf16=True",
)


def loss_unscaled(record: Record) -> Iterator[Finding]:
    """Backward computes in float16, and nothing was multiplied with a scale that keeps small gradients from zero."""
    by_hand = hand_scales(record)
    autocast = False  # the forward before ran under float16 autocast
    for event in record.events:
        if event.kind == "forward" and event.grad:
            autocast = torch.float16 in {**event.within, **event.autocast}.values()
        if event.kind != "backward" or event.library in ENGINES or event.factor in by_hand:
            continue
        if torch.float16 not in event.products and (event.products or not autocast):
            continue
        if event.scaler is not None and not event.partly:
            continue
        asked = event.library == "Lightning" and not autocast  # "16-true"
        yield Finding(
            "loss-unscaled",
            "info" if asked else "error" if autocast or event.partly else "warning",
            "a part of the loss was not scaled"
            if event.partly
            else f"backward ran in float16 from an unscaled loss{_why_no_scale(record)}",
            "the gradient of that part is divided by the scale all the same"
            if event.partly
            else "gradients below 6e-8 are zero in float16 and those below 6e-5 lose digits: layers far from the loss "
            "stop to learn, and nothing tells",
            _SCALE,
            line=event.line,
        )


def _why_no_scale(record: Record) -> str:
    if record.of("scaler_off"):
        return ': the scaler is disabled (GradScaler("cuda") disables itself where there is no CUDA)'
    if record.of("scaler_step", "scaler_update", "unscale") and not record.of("scale"):
        return ": a scaler is there, and its scale(loss) is never called"
    return "" if record.of("scale") else ": there is no scaler"


def never_scaled(record: Record) -> Iterator[Finding]:
    """A scaler unscales gradients of a loss that was not scaled."""
    for moment in replay(record):
        event = moment.event
        inverse = event.inverse if event.kind == "unscaled" else None
        if event.kind == "step" and event.grad_scale:
            inverse = 1 / event.grad_scale
        if inverse is None or inverse > 0.5:
            continue
        ids = [each for each in event.ids if each in moment.carried and moment.carried[each].scale == 1.0]
        if ids:
            yield Finding(
                "never-scaled",
                "error",
                f"the scaler divided gradients by {1 / inverse:,.0f}, and their loss was never multiplied with it",
                "the gradients are that much too small: the model hardly moves, or not at all",
                _SCALE,
                line=event.line,
                module=name_of(record, ids),
            )


def stepped_while_scaled(record: Record) -> Iterator[Finding]:
    """An optimizer steps with gradients that still carry a scale, or without a look at what overflowed."""
    for moment in replay(record):
        event = moment.event
        if event.kind not in ("step", "stepped") or event.closure:
            continue
        taken = event.grad_scale or 1.0  # by a fused step
        ids = [each for each in moment.scaled() if moment.carried[each].factor / taken >= 2]
        if event.scaler is not None:  # what another scaler left is a finding of its own
            ids = [each for each in ids if moment.carried[each].scaler == event.scaler]
        if ids:
            factor = max(moment.carried[each].factor for each in ids) / taken
            yield Finding(
                "stepped-while-scaled",
                "error",
                f"{event.name} stepped with gradients that were {factor:,.0f} times too large"
                + (": their loss was scaled twice" if event.scaler is not None else ""),
                "SGD's updates are that many times too large; Adam hides it, but its epsilon, weight decay and "
                "clipping act otherwise than they should, and steps that overflowed are taken",
                _STEP,
                line=event.line,
                module=name_of(record, ids),
            )
        unscaled = [moment.carried[each].by for each in event.ids if each in moment.carried]
        checked = [each for each in unscaled if each is not None and each.kind == "unscaled"]
        if not ids and event.scaler is None and checked:
            taken_inf = any(each.found for each in checked)
            yield Finding(
                "overflow-unchecked",
                "error" if taken_inf else "warning",
                f"{event.name} stepped by itself, behind the scaler's unscale_"
                + (", with gradients that are inf or NaN" if taken_inf else ""),
                "scaler.step is what leaves out a step whose gradients overflowed: optimizer.step() takes it, and the "
                "parameters are NaN from then on",
                _STEP,
                line=event.line,
            )


_STEP = Remedy(
    torch="call scaler.step(optimizer) and scaler.update() in place of optimizer.step(), and scale each loss once; "
    "without a scaler divide the gradients by the scale before",
    ours='fabric.backward(loss) and optimizer.step() under Fabric(precision="16-mixed") unscale by themselves',
    accelerate="step the optimizer that accelerator.prepare returned",
    lightning="step the optimizer that fabric.setup returned",
    trainer="step the optimizer that self.optimizers() returns",
    deepspeed="engine.step() in place of optimizer.step()",
)


def half_under_scaler(record: Record) -> Iterator[Finding]:
    """Parameters that train are half, and a scaler unscales their gradients."""
    for event in record.of("scaler_step", "unscale"):
        if event.library in ENGINES or not (event.dtypes & {torch.float16, torch.bfloat16}):
            continue
        half = torch.float16 in event.dtypes
        yield Finding(
            "half-params-under-scaler",
            "error" if half else "warning",
            f"{_how_many(record, event)} parameters that train are {'float16' if half else 'bfloat16'}, under a scaler",
            'torch raises "Attempting to unscale FP16 gradients" at them: a gradient in float16 is rounded once more '
            "when "
            "the scale is taken off, which undoes what the scale is for; updates of float16 parameters round to nothing"
            if half
            else "bfloat16 has the range of float32, so the scale saves nothing, and updates of bfloat16 parameters "
            "round "
            "to nothing",
            Remedy(
                torch="keep the parameters in float32 (model.float(), before the optimizer is made) and compute in "
                "float16 by torch.autocast(device, torch.float16). Frozen ones may stay half: optimize those that "
                "train "
                "alone",
                ours='Fabric(precision="16-mixed") with a float32 model; "16-master" keeps float16 parameters beside a '
                "float32 master",
                lightning='a float32 model under Fabric(precision="16-mixed")',
                accelerate='load the model in float32 under Accelerator(mixed_precision="fp16")',
                transformers="from_pretrained(..., dtype=torch.float32) under TrainingArguments(fp16=True)",
            ),
            line=event.line,
            module=_half_modules(record, event),
        )
        return


def _halves(record: Record, event: Event) -> list[str]:
    names = {record.params.get(each, "") for each in event.ids}
    halves = (torch.float16, torch.bfloat16)
    return [
        each.name for each in record.stored if each.kind == "params" and each.name in names and each.dtype in halves
    ]


def _how_many(record: Record, event: Event) -> str:
    names = _halves(record, event)
    return f"{len(names)} of {len(event.ids)}" if names else "some"


def _half_modules(record: Record, event: Event) -> str:
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in _halves(record, event)))
    return ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")


def needless_scaler(record: Record) -> Iterator[Finding]:
    """A scaler scales, and nothing is float16."""
    scales = [event for event in record.of("scale") if event.library not in ENGINES]
    if not scales or not record.of("backward"):
        return
    half = any(torch.float16 in (*op.inputs, op.output) for op in record.ops)
    if half or any(torch.float16 in event.autocast.values() for event in record.of("forward")):
        return
    if any(torch.bfloat16 in event.dtypes for event in record.of("unscale")):
        return
    yield Finding(
        "needless-scaler",
        "info",
        "the loss is scaled, and nothing is computed in float16",
        "float32 and bfloat16 have the range that the scale is for; each step checks all gradients for inf, and "
        "waits for "
        "the answer",
        Remedy(
            torch="torch.amp.GradScaler(device, enabled=dtype == torch.float16)",
            ours='Fabric(precision="bf16-mixed") scales nothing',
            accelerate='Accelerator(mixed_precision="bf16") has no scaler',
        ),
        line=scales[0].line,
    )


RULES = (loss_unscaled, never_scaled, stepped_while_scaled, half_under_scaler, needless_scaler)
