"""Rules about autocast: contexts that do nothing, that cover too much or too little, and the casts they keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.kinds import PRODUCTS
from precision_lab.auditing.ledger import short
from precision_lab.auditing.ops import HALVES
from precision_lab.auditing.record import FORWARD, LOOP, Context, Event, Record
from precision_lab.auditing.replay import ENGINES, name_of

_OURS = 'Fabric(precision="bf16-mixed") enters autocast for the device that it moves the model to, around forward alone'
_LIGHTNING = 'leave autocast to Fabric(precision="bf16-mixed"), or enter fabric.autocast()'
_TRAINER = 'leave autocast to Trainer(precision="bf16-mixed"), which runs training_step under it'
_ACCELERATE = 'leave autocast to Accelerator(mixed_precision="bf16"), or enter accelerator.autocast()'


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
            ours=_OURS,
            lightning=_LIGHTNING,
            trainer=_TRAINER,
            accelerate=_ACCELERATE,
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
                ours=_OURS,
                lightning=_LIGHTNING,
                trainer=_TRAINER,
                accelerate=_ACCELERATE,
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


def stale_casts(record: Record) -> Iterator[Finding]:
    """A forward after a step uses the half copies of the parameters that autocast made before it."""
    stepped: dict[int, set[int]] = {}  # cache -> ids that changed while it was in use
    for event in record.events:
        if event.kind == "step" and event.cache is not None:
            stepped.setdefault(event.cache, set()).update(event.ids)
        if event.kind != "forward" or not event.grad or event.cache is None or event.device not in event.autocast:
            continue
        stale = [each for each in event.ids if each in stepped.get(event.cache, ())]
        narrower = [each for each in stale if record.trained.get(record.params.get(each, "")) is torch.float32]
        if narrower:
            yield Finding(
                "stale-casts",
                "error",
                f"forward ran in the autocast context in which {len(narrower)} of its parameters were stepped before",
                f"autocast keeps the {short(event.autocast[event.device])} copy of each weight until its outermost "
                "context ends: this forward computed with the weights of before the step, and so will all that follow",
                Remedy(
                    torch="enter torch.autocast in each iteration, around forward and loss alone; the step behind it",
                    ours=_OURS,
                    lightning=_LIGHTNING,
                    trainer=_TRAINER,
                    accelerate=_ACCELERATE,
                ),
                line=event.line,
                module=event.root or name_of(record, narrower),
            )


def cast_without_gradients(record: Record) -> Iterator[Finding]:
    """A parameter was cast to half under no_grad, and gets no gradient."""
    cast = {event.name: event for event in record.of("cast_without_gradients") if event.name}
    reported = set[str]()
    for event in record.of("step"):
        for each in event.without:
            name = record.params.get(each, "")
            if name in cast and name not in reported and not event.closure:
                reported.add(name)
                yield Finding(
                    "cast-without-gradients",
                    "error",
                    f"{name} trains, was cast to half under no_grad, and had no gradient at the step",
                    "a half copy that was made under no_grad is a constant to autograd; what is computed with it does "
                    "not reach the parameter, which stays as it is",
                    _OWN_CONTEXT,
                    line=cast[name].line,
                    module=name.rpartition(".")[0],
                )


def cast_under_no_grad(record: Record) -> Iterator[Finding]:
    """A forward under no_grad shares autocast's weight cache with one that trains: in older versions of torch the cast
    weights stay without gradients."""
    without: dict[int, Event] = {}  # cache -> forward under no_grad in it
    for event in record.of("forward"):
        if event.cache is None or event.device not in event.autocast or not event.ids:
            continue
        before = without.get(event.cache)
        if not event.grad:
            without.setdefault(event.cache, event)
        elif before is not None and set(before.ids) & set(event.ids):
            yield Finding(
                "cast-without-gradients",
                "info",
                f"a forward under no_grad runs in the same autocast context as one that trains, {event.line}",
                "autocast keeps the cast weights until the context ends. In older versions of torch those cast under "
                "no_grad were used by the forward that trains, whose weights then got no gradients; here they do",
                _OWN_CONTEXT,
                line=before.line,
                module=before.root,
            )


_OWN_CONTEXT = Remedy(
    torch="cast within the forward that trains; a no_grad forward of the same model gets a torch.autocast context of "
    "its own",
    ours="evaluate outside of fabric.autocast(): each forward has a context of its own",
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
    stale_casts,
    cast_without_gradients,
    cast_under_no_grad,
)
