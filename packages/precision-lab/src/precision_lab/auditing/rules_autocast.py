"""Rules about autocast: contexts that do nothing, that cover too much or too little, and the casts they keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.kinds import PRODUCTS
from precision_lab.auditing.ledger import short
from precision_lab.auditing.ops import HALVES
from precision_lab.auditing.record import FORWARD, LOOP, Context, Event, Record
from precision_lab.auditing.replay import ENGINES

OURS = 'Fabric(precision="bf16-mixed") enters autocast for the device that it moves the model to, around forward alone'
LIGHTNING = 'leave autocast to Fabric(precision="bf16-mixed"), or enter fabric.autocast()'
TRAINER = 'leave autocast to Trainer(precision="bf16-mixed"), which runs training_step under it'
ACCELERATE = 'leave autocast to Accelerator(mixed_precision="bf16"), or enter accelerator.autocast()'


def other_device(record: Record) -> Iterator[Finding]:
    """Autocast was asked for, and torch does nothing of it: for another device than the model's, or in no such "
    "dtype."""
    devices = {event.device for event in record.of("forward")}
    for event in _forwards(record):
        if event.device in (None, "meta") or event.device in _under(event):
            continue
        own = [each for each in event.contexts if each.device == event.device]
        if own and not own[-1].asked:  # turned off for this part
            continue
        if own:
            yield _does_nothing(
                record, own[-1], f'torch disabled autocast("{event.device}", {short(own[-1].dtype)})', "the dtype"
            )
        elif event.contexts and event.contexts[-1].asked and event.contexts[-1].device not in devices:
            last = event.contexts[-1]
            said = f'autocast is for "{last.device}", and the parameters are on "{event.device}"'
            yield _does_nothing(record, last, said, "the device")
    computed = {event.device for event in record.of("backward")}
    entered = [event for event in record.of("autocast") if event.asked and event.library not in ENGINES]
    if not _forwards(record) and computed and entered and not computed & {event.device for event in entered}:
        said = f'autocast is for "{entered[0].device}", and the loss is on "{min(computed)}"'  # a loop without modules
        yield _does_nothing(record, Context(entered[0].device, entered[0].dtype, True, False), said, "the device")


def _does_nothing(record: Record, context: Context, what: str, cause: str) -> Finding:
    entered = [
        event for event in record.of("autocast") if (event.device, event.dtype) == (context.device, context.dtype)
    ]
    return Finding(
        "autocast-does-nothing",
        "warning",
        f"{what}: everything was computed in the dtype of the parameters",
        f"autocast acts on one type of device, in bfloat16 or float16; nothing is faster or smaller here ({cause} is "
        "another)",
        Remedy(
            torch="torch.autocast(device_type=next(model.parameters()).device.type, dtype=torch.bfloat16)",
            ours=OURS,
            lightning=LIGHTNING,
            trainer=TRAINER,
            accelerate=ACCELERATE,
        ),
        line=entered[0].line if entered else None,
    )


def around_nothing(record: Record) -> Iterator[Finding]:
    """Autocast is entered, and all that it could speed up runs outside of it."""
    entered = [
        event
        for event in record.of("autocast")
        if event.enabled and not event.inside and event.library not in ENGINES and event.device in record.devices
    ]
    forwards = _forwards(record)
    if not entered or not forwards or any(_under(event) for event in record.of("forward")):
        return
    products = [op for op in record.ops if op.kind in PRODUCTS and op.inputs and op.phase in (FORWARD, LOOP)]
    if products and not any(op.inputs[-1] in HALVES or op.autocast for op in products):
        yield Finding(
            "autocast-around-nothing",
            "warning",
            f"autocast is entered here, and no product runs in it: the model runs outside, {forwards[0].line}",
            "autocast speeds up matrix products and convolutions; around a loss alone it does nothing",
            Remedy(
                torch="enter torch.autocast around the call of the model, and the loss",
                ours=OURS,
                lightning=LIGHTNING,
                trainer=TRAINER,
                accelerate=ACCELERATE,
            ),
            line=entered[0].line,
        )


def around_backward(record: Record) -> Iterator[Finding]:
    """Backward ran inside of an autocast context."""
    for event in record.of("backward"):
        if event.autocast and event.library not in ENGINES and not _by_trainer(record, event):
            yield Finding(
                "autocast-around-backward",
                "warning",
                f"backward ran under autocast for {', '.join(event.autocast)}",
                "backward uses the dtypes that forward chose; under autocast what it computes anew (custom functions, "
                "checkpoints, gradients of gradients) is cast once more, and torch advises against it",
                Remedy(
                    torch="end the context after the loss: `with torch.autocast(...)` around forward and loss, "
                    "backward "
                    "behind it",
                    ours="fabric.backward(loss), outside of fabric.autocast()",
                    lightning="call fabric.backward(loss) outside of fabric.autocast()",
                    trainer="return the loss from training_step, or call self.manual_backward(loss) outside of your "
                    "own torch.autocast",
                    accelerate="call accelerator.backward(loss) outside of accelerator.autocast()",
                ),
                line=event.line,
            )


def _by_trainer(record: Record, event: Event) -> bool:
    """Whether all that is open was entered by Lightning's Trainer, which runs the whole training_step under it."""
    return record.host == "Trainer" and all(each.library == "Lightning" for each in event.contexts)


def forward_outside(record: Record) -> Iterator[Finding]:
    """A model trains inside of autocast in one place, and outside of it in another."""
    order = {id(event): number for number, event in enumerate(record.events)}
    backward = next((order[id(event)] for event in record.of("backward")), len(order))
    inside = {event.root: event for event in _forwards(record) if event.device in _under(event)}
    penalties = any(event.create_graph for event in record.of("autograd_grad"))
    for event in _forwards(record):
        if event.device in _under(event) or any(each.device == event.device for each in event.contexts):
            continue
        # One before the first backward alone is a dry run.
        again = any(each.line == event.line and order[id(each)] > backward for each in _forwards(record))
        if event.root in inside and again:
            known = inside[event.root]
            yield Finding(
                "forward-outside-autocast",
                "info" if penalties else "warning",  # penalties on gradients are computed in float32 on purpose
                f"a forward that trains ran outside of autocast, in float32; {known.line} runs the same model "
                "inside, in "
                f"{short(_under(known)[known.device])}",
                "this forward takes the time and memory of float32, and differs from the other by rounding",
                Remedy(
                    torch="enter torch.autocast around this forward, too; torch.autocast(..., enabled=False) says "
                    "that it "
                    "is meant so",
                    ours="call the model that fabric.setup returned: its forward has autocast",
                    lightning="call the model that fabric.setup returned",
                    trainer="compute it in training_step, without torch.autocast(enabled=False)",
                    accelerate="call the model that accelerator.prepare returned",
                ),
                line=event.line,
                module=event.root,
                sure="likely",
            )


def _under(event: Event) -> dict[str, torch.dtype]:
    """Autocast of a forward: around it, or entered in it, as libraries do that wrap it."""
    return {**event.within, **event.autocast}


def _forwards(record: Record) -> list[Event]:
    """Forward calls that train, by the user's loop or a library's."""
    return [
        event
        for event in record.of("forward")
        if event.grad and event.training and not event.recompute and event.library not in ENGINES and event.params
    ]


RULES = (
    other_device,
    around_nothing,
    around_backward,
    forward_outside,
)
