"""Rules about a scaler's scale changing at the wrong time, and about gradients of several scales."""

from __future__ import annotations

from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import ENGINES, Moment, name_of, replay

_ORDER = Remedy(
    torch="in an iteration: every scaler.scale(loss).backward(), then scaler.step(optimizer) of each optimizer, then "
    "scaler.update() once; under accumulation step and update behind the last micro-batch alone",
    ours="fabric.backward(loss) for each micro-batch, then optimizer.step(), which updates the scaler by itself",
    accelerate="with accelerator.accumulate(model): accelerator.backward(loss); optimizer.step(), which updates "
    "by itself",
)


def updated_per_optimizer(record: Record) -> Iterator[Finding]:
    """The scaler was updated between the backward of a gradient and its step."""
    updates: dict[int, list[Event]] = {}
    for moment in replay(record):
        event = moment.event
        if event.kind == "scaler_update":
            updates.setdefault(event.scaler, []).append(event)
        if event.kind not in ("unscale", "scaler_step"):
            continue
        if found := _updated_since(moment, len(updates.get(event.scaler, ()))):
            before = updates[event.scaler][found - 1]
            yield Finding(
                "update-per-optimizer",
                "error",
                "scaler.update() ran after the backward of these gradients and before their step"
                + (f": {event.line} steps with the scale of another step" if event.line else ""),
                "update changes the scale when gradients overflowed and every growth_interval steps; gradients that "
                "were "
                "scaled before it are then divided by another scale, unscaled ones once more",
                Remedy(
                    torch="call scaler.update() once in an iteration, after the last scaler.step",
                    ours="optimizer.step() under Fabric updates the scaler by itself, each optimizer with its own "
                    "record",
                ),
                line=before.line,
            )


def _updated_since(moment: Moment, updates: int) -> int:
    """Returns the number of the scaler's update after the backward of the event's gradients; 0: there was none."""
    for each in moment.event.ids:
        carried = moment.carried.get(each)
        if carried is not None and carried.scaler == moment.event.scaler and not carried.used:
            return carried.updates + 1 if carried.updates < updates else 0
    return 0


def update_missing(record: Record) -> Iterator[Finding]:
    """A scaler steps again without an update in between, or updates with no step before it: torch raises."""
    stepped: dict[tuple[int, int], Event] = {}
    for event in record.events:
        if event.library in ENGINES:
            continue
        raised = event.kind in ("scaler_step", "unscale") and event.ran is None
        if raised and (event.scaler, event.optimizer) in stepped:
            yield Finding(
                "update-missing",
                "error",
                "the scaler unscales or steps again, and scaler.update() was not called since its last step",
                "torch raises a RuntimeError here; update() looks at what overflowed, and sets the next scale",
                _ORDER,
                line=stepped[event.scaler, event.optimizer].line,
            )
        if event.kind == "scaler_step" and event.ran is not None:
            stepped[event.scaler, event.optimizer] = event
        elif event.kind == "scaler_update":
            stepped = {key: value for key, value in stepped.items() if key[0] != event.scaler}
            if not event.ran:
                yield Finding(
                    "update-without-step",
                    "error",
                    "scaler.update() was called where no gradients had been unscaled or stepped",
                    "torch raises an AssertionError here: there is nothing to update the scale by",
                    _ORDER,
                    line=event.line,
                )


def another_scaler(record: Record) -> Iterator[Finding]:
    """Gradients that one scaler scaled are unscaled by another."""
    for moment in replay(record):
        event = moment.event
        if event.kind not in ("unscale", "scaler_step"):
            continue
        ids = [each for each in moment.scaled() if moment.carried[each].scaler not in (None, event.scaler)]
        if ids:
            yield Finding(
                "another-scaler",
                "error",
                f"gradients of {len(ids)} parameters are unscaled by another scaler than the one that scaled "
                f"their loss",
                "each scaler has a scale of its own, which changes with what it sees overflow: sooner or later "
                "gradients "
                "are divided by another number than they were multiplied with",
                _ORDER,
                line=event.line,
                module=name_of(record, ids),
            )


def mixed_scales(record: Record) -> Iterator[Finding]:
    """A step takes gradients to which backward added others of another scale."""
    for moment in replay(record):
        event = moment.event
        if event.kind not in ("step", "scaler_step") or event.data.get("closure"):
            continue
        ids = [each for each in event.ids if each in moment.carried and moment.carried[each].mixed]
        if ids:
            yield Finding(
                "scales-mixed",
                "error",
                f"gradients of {len(ids)} parameters are sums of backward passes with different loss scales",
                "a backward added to gradients that were unscaled already, or scaled otherwise: one of the two "
                "counts as "
                "good as nothing",
                _ORDER,
                line=event.line,
                module=name_of(record, ids),
            )


def scaler_per_step(record: Record) -> Iterator[Finding]:
    """Each step has a scaler of its own, which forgets what the last one learned."""
    scalers: dict[int, list[Event]] = {}
    for event in record.of("scaler_step"):
        if event.library not in ENGINES:
            scalers.setdefault(event.optimizer, []).append(event)
    for events in scalers.values():
        if len(events) > 1 and len({event.scaler for event in events}) == len(events):
            yield Finding(
                "scaler-per-step",
                "warning",
                f"{len(events)} steps of an optimizer had {len(events)} scalers",
                "a new scaler begins with its first scale: one that overflows is never lowered, so that all steps are "
                "skipped, and one that is too low never grows",
                Remedy(
                    torch="make one torch.amp.GradScaler before the loop",
                    ours='Fabric(precision="16-mixed") keeps one for the whole run',
                ),
                line=events[1].line,
            )


RULES = (scaler_per_step, updated_per_optimizer, update_missing, another_scaler, mixed_scales)
