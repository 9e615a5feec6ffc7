"""Rules about the half copies of weights that autocast keeps: old ones, and ones without gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.ledger import short
from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import name_of
from precision_lab.auditing.rules_autocast import ACCELERATE, LIGHTNING, OURS, TRAINER


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
                    ours=OURS,
                    lightning=LIGHTNING,
                    trainer=TRAINER,
                    accelerate=ACCELERATE,
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


RULES = (stale_casts, cast_without_gradients, cast_under_no_grad)
