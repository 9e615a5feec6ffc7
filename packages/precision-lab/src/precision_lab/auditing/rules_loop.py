"""Rules about a loop's order: zero_grad, backward and step, and about parameters that are replaced."""

from __future__ import annotations

from collections.abc import Iterator

from precision_lab.auditing.finding import Finding, Remedy
from precision_lab.auditing.ledger import short
from precision_lab.auditing.record import Event, Record
from precision_lab.auditing.replay import Moment, name_of, replay

_ZERO = Remedy(
    torch="call optimizer.zero_grad() once in an iteration: after optimizer.step(), or before the first backward",
    ours="call optimizer.zero_grad() once in an iteration, after optimizer.step()",
)


def gradients_kept(record: Record) -> Iterator[Finding]:
    """A step takes gradients that have those of earlier steps in them."""
    for moment in _steps(record):
        ids = [each for each in moment.event.ids if each in moment.carried and moment.carried[each].old]
        if ids:
            yield Finding(
                "gradients-kept",
                "error",
                f"{_taker(moment.event)} took gradients of {len(ids)} parameters that earlier steps had taken already",
                "nothing clears the gradients after a step, so each backward adds to those of all steps before: the "
                "updates grow, and in a half dtype small new gradients are rounded away beside the old ones",
                _ZERO,
                line=moment.event.line,
                module=name_of(record, ids),
            )


def cleared_before_step(record: Record) -> Iterator[Finding]:
    """Backward gave gradients, and none of them was there at the step."""
    for moment in _steps(record):
        event = moment.event
        given = [each for each in event.ids if each in moment.given]
        if given and all(each in event.without or each not in moment.carried for each in given):
            yield Finding(
                "cleared-before-step",
                "error",
                f"{_taker(event)} found no gradients: those of {len(given)} parameters were cleared after backward",
                "a step without gradients changes nothing (weight decay and momentum aside): the model does not train",
                Remedy(
                    torch="call optimizer.zero_grad() before backward or after optimizer.step(), not between them",
                    ours="call optimizer.zero_grad() after optimizer.step()",
                ),
                line=event.line,
            )


def stepped_without_gradients(record: Record) -> Iterator[Finding]:
    """Backward ran, and gave none of an optimizer's parameters a gradient."""
    backwards = 0
    for moment in replay(record):
        event = moment.event
        backwards += event.kind == "backward"
        if event.kind not in ("step", "stepped", "scaler_step") or event.data.get("closure"):
            continue
        seen, backwards = backwards, 0
        trains = [each for each in event.ids if each in event.without]
        missed = bool(trains) and not any(each in moment.given or each in moment.carried for each in event.ids)
        if not seen or not missed:
            continue
        known = [each for each in event.ids if record.params.get(each)]
        yield Finding(
            "stepped-without-gradients",
            "error",
            f"{_taker(event)} has {len(trains)} parameters that train, and backward gave none of them a gradient"
            + ("" if known else ": no model that ran has them"),
            "the model that ran holds other parameters than the optimizer: it was copied, rebuilt, or its parameters "
            "were replaced after the optimizer was made"
            if not known
            else "the loss does not depend on them: their part of the model was detached, ran under no_grad, or is not "
            "in the loss",
            Remedy(
                torch="make the optimizer last, from the parameters of the model that runs"
                if not known
                else "compute the loss from them, without detach() and no_grad, or leave them out of the optimizer",
                ours="model, optimizer = fabric.setup(model, optimizer), with the optimizer of that very model",
            ),
            line=event.line,
            module=name_of(record, trains) if known else "",
        )


def replaced_parameters(record: Record) -> Iterator[Finding]:
    """An optimizer steps parameters that no model has, and the model has others that no optimizer steps."""
    steps = record.of("step")
    stepped = {each for event in steps for each in event.ids}
    given = {each for event in record.of("backward") for each in event.ids}
    missed = [each for each in given - stepped if record.params.get(each)]
    for event in steps:
        gone = [each for each in event.without if not record.params.get(each) and each not in given]
        if gone and missed and len(gone) < len(event.ids):
            names = ", ".join(sorted(record.params[each] for each in missed)[:3])
            yield Finding(
                "replaced-parameters",
                "error",
                f"{event.name} has {len(gone)} parameters that no model has, and steps none of {names}",
                "a part of the model was replaced after the optimizer was made: its new parameters get gradients, and "
                "never change",
                Remedy(
                    torch="make the optimizer last, from the parameters of the model that runs",
                    ours="change the model before fabric.setup(model, optimizer), and make the optimizer after that",
                ),
                line=event.line,
                module=name_of(record, sorted(missed)),
            )


_COPY = Remedy(
    torch="cast a copy: copy.deepcopy(model).half(), or {k: v.half() for k, v in model.state_dict().items()}",
    ours="cast a copy of the model that fabric.setup returned",
    transformers="trainer.save_model(folder), then load and cast what was saved",
    trainer="cast a copy: copy.deepcopy(self.net).half()",
)


def recast_while_training(record: Record) -> Iterator[Finding]:
    """Parameters have another dtype than at the step before, or had one in between."""
    for event in record.of("recast"):
        saved = [each for each in record.of("saved") if each.step == event.step or each.step == event.step - 1]
        yield Finding(
            "recast-while-training",
            "error" if event.new.itemsize < event.old.itemsize else "warning",
            f"{len(event.names)} parameters are {short(event.new)} at this step, and were {short(event.old)} before",
            "model.half(), model.to(dtype) and the like change the model itself: training goes on with rounded "
            "parameters, and the optimizer's state is of another dtype than they"
            + (f"; {saved[-1].line} saved the model in between" if saved else ""),
            _COPY,
            line=event.line,
            module=event.names[0].rpartition(".")[0] if len(event.names) == 1 else "",
        )


def rounded_in_between(record: Record) -> Iterator[Finding]:
    """A model that trains was cast to half and back between two steps."""
    stepped = set[int]()
    for number, event in enumerate(record.events):
        if event.kind == "step":
            stepped |= set(event.ids)
        elif event.kind == "module_cast" and event.to.itemsize < event.of.itemsize and stepped & set(event.ids):
            after = record.events[number + 1 :]
            back = next((each for each in after if each.kind in ("step", "recast", "module_cast")), None)
            if back is not None and back.kind == "module_cast" and set(back.ids) & set(event.ids):
                yield Finding(
                    "recast-while-training",
                    "error" if back.to is event.of else "warning",
                    f"the model that trains was cast from {short(event.of)} to {short(event.to)} and back",
                    "model.half(), model.to(dtype) and the like change the model itself: the cast back does not bring "
                    "back what was rounded, so training goes on from rounded parameters",
                    _COPY,
                    line=event.line,
                    module=event.path,
                )


def _steps(record: Record) -> Iterator[Moment]:
    for moment in replay(record):
        # With a closure backward is yet to come.
        if moment.event.kind in ("step", "stepped", "scaler_step") and not moment.event.data.get("closure"):
            yield moment


def _taker(event: Event) -> str:
    return str(event.data.get("name", "scaler.step"))


RULES = (
    gradients_kept,
    cleared_before_step,
    stepped_without_gradients,
    replaced_parameters,
    recast_while_training,
    rounded_in_between,
)
