"""Rules about schedules of the learning rate: on steps that were skipped, and before the first step."""

from __future__ import annotations

import re
from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import ENGINES

_AFTER = Remedy(
    torch="step the scheduler only where the optimizer stepped: before = scaler.get_scale(); scaler.step(optimizer); "
    "scaler.update(); if scaler.get_scale() >= before: scheduler.step()",
    ours="scheduler = fabric.setup_schedulers(scheduler): its steps do nothing after a skipped optimizer step",
    accelerate="scheduler = accelerator.prepare(scheduler) skips with the optimizer",
)
_SKIPPED = (
    "gradients had overflowed, so the parameters stayed, and the learning rate moved on: warm-up is shorter than "
    "planned, by one step for each skipped one"
)
_MULTIPLIED = re.compile(r"[*/]=")


def scheduler_on_skipped_step(record: Record) -> Iterator[Finding]:
    """The learning rate goes on although the scaler skipped the step."""
    attempts: dict[int, list[Event]] = {}  # optimizer -> steps tried since the scheduler's last step
    guarded = any(event.library == "" for event in record.of("scale_read"))
    for event in record.events:
        if event.kind == "scaler_step" and event.ran is not None:
            attempts.setdefault(event.optimizer, []).append(event)
        if event.kind != "scheduler" or event.library in ENGINES:
            continue
        tried = attempts.pop(event.optimizer, [])
        if tried and not any(each.ran for each in tried):
            yield Finding(
                "scheduler-on-skipped-step",
                "info" if event.library == "Lightning" else "warning",
                "the scheduler stepped after a step that the scaler had skipped",
                _SKIPPED,
                _AFTER,
                line=event.line,
            )
        elif len(tried) == 1 and not guarded and event.library == "":
            yield Finding(
                "scheduler-unguarded",
                "info",
                "the scheduler steps after each scaler.step, skipped or not; none was skipped here",
                "where gradients overflow the scaler skips the optimizer's step alone",
                _AFTER,
                line=event.line,
            )


def scheduler_before_optimizer(record: Record) -> Iterator[Finding]:
    """In each iteration the scheduler steps first, so the first learning rate is never used."""
    order: dict[int, list[Event]] = {}
    for event in record.of("scheduler", "step", "scaler_step"):
        if event.kind != "step" or event.scaler is None:  # a step within scaler.step counts once
            order.setdefault(event.optimizer, []).append(event)
    for events in order.values():
        kinds = "".join("S" if event.kind == "scheduler" else "P" for event in events)
        first = events[0]
        if kinds.startswith("SPSP") or (kinds in ("SP", "SPS") and first.step == 0 and _after_backward(record, first)):
            yield Finding(
                "scheduler-before-optimizer",
                "warning",
                "scheduler.step() runs before the optimizer's step",
                "the first learning rate of the schedule is skipped, and all others come a step early",
                Remedy(
                    torch="call optimizer.step() (or scaler.step(optimizer)), then scheduler.step()",
                    ours="call optimizer.step(), then scheduler.step()",
                ),
                line=first.line,
            )


def _after_backward(record: Record, event: Event) -> bool:
    return any(each.kind == "backward" for each in record.events[: record.events.index(event)])


def rate_set_on_skipped_step(record: Record) -> Iterator[Finding]:
    """The loop sets the learning rate itself, and did so after a step that the scaler had skipped."""
    skipped: dict[int, Event] = {}
    scheduled = {event.optimizer for event in record.of("scheduler")}
    for event in record.of("scaler_step"):
        before = skipped.pop(event.optimizer, None)
        if event.library in ENGINES or event.optimizer in scheduled or event.ran is None:
            continue
        if before is not None and before.lrs != event.lrs:
            line = record.rate_line
            # A rate that is a function of the iteration goes on by itself, and is meant to; one that counts its own
            # calls, or is multiplied, is a scheduler.
            counts = line is not None and (line.function != "" or _MULTIPLIED.search(line.text) is not None)
            yield Finding(
                "scheduler-on-skipped-step",
                "warning" if counts else "info",
                f"the learning rate went from {before.lrs[0]:.3g} to {event.lrs[0]:.3g} after a step that the scaler "
                "had skipped",
                _SKIPPED,
                _AFTER,
                line=line or event.line,
                sure="likely",
            )
            return
        if event.ran is False:
            skipped[event.optimizer] = event


RULES = (scheduler_on_skipped_step, scheduler_before_optimizer, rate_set_on_skipped_step)
