"""Runs a step once more, and says where it first goes wrong, of what, and what mends it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from precision_lab.explaining.causes import cause_of
from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.loss import explain_loss
from precision_lab.explaining.numbers import is_finite
from precision_lab.explaining.optimizers import explain_optimizer, explain_update
from precision_lab.explaining.remedies import try_fixes, try_paths, try_scale
from precision_lab.explaining.replay import Context, Outcome, Step, inner, run
from precision_lab.explaining.rounding import explain_rounding
from precision_lab.explaining.stored import explain_leaf, masks_of
from precision_lab.explaining.trace import Origin, hidden_overflow, origin_of, overflow_behind
from precision_lab.explaining.underflow import explain_underflow
from precision_lab.explaining.watched import BACKWARD, IN_LOSS, LOSS, Modules, Watched, Went


def explain(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Tensor | Callable[[Any], Tensor] | None = None,
    output_gradients: Tensor | Sequence[Tensor | None] | None = None,
    scale: float = 1.0,
    optimizer: Optimizer | None = None,
    context: Context | Mapping[str, torch.dtype] | None = None,
    rng_state: Tensor | Mapping[str, Any] | None = None,
    remedies: bool = True,
) -> Explanation:
    """Runs a training step's forward and backward once more, and finds the operation that first goes wrong.

    To be called with the weights that the step began with: after a loss or gradient that is not finite, before the
    optimizer's step. The model, its buffers, gradients and hooks and the random state are afterwards as they were.
    Under DDP no other rank is asked. Under FSDP2 the forward gathers weights: call it on every rank.

    Args:
        model: as the loop calls it, set up by any library or by none.
        args: what the loop calls it with: a tuple, or the only argument.
        kwargs: the same by name.
        loss: what computes the loss from the model's output, as a function; or the loss itself, of which the graph is
            read as far as backward has not freed it. None: the output is the loss, or `output_gradients` are given.
        output_gradients: the gradient that reached each tensor of the output, in order, None for one without.
        scale: what the loss was multiplied with before backward.
        optimizer: looked at where forward and backward are finite.
        context: what the loop calls the model in, made by a function, or as {"cuda": torch.float16} for autocast. None:
            autocast as it is where this is called.
        rng_state: torch's random state before the forward (of the CPU; or device type -> state). None: as it is.
        remedies: whether to try them; each try is one more forward and backward.

    Raises:
        TypeError: the model is no module of torch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain({type(model).__name__}): expected a torch.nn.Module, as the loop calls it")
    if isinstance(output_gradients, Tensor):
        output_gradients = [output_gradients]
    step = Step(
        inner(model),
        args if isinstance(args, tuple) else tuple(args) if isinstance(args, list) else (args,),
        dict(kwargs or {}),
        _context(context),
        {"cpu": rng_state} if isinstance(rng_state, Tensor) else dict(rng_state or {}),
        list(output_gradients) if output_gradients is not None else None,
        loss if callable(loss) and not isinstance(loss, Tensor) else None,
        scale,
    )
    compiled = "torch._dynamo" in sys.modules  # else nothing is, and to ask would import it
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        found = _explain(step, loss if isinstance(loss, Tensor) else None, optimizer, remedies)
    found.model = type(inner(model)).__name__
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found.rank = torch.distributed.get_rank()
    return found


def _explain(step: Step, loss: Tensor | None, optimizer: Optimizer | None, remedies: bool) -> Explanation:
    modules = Modules(step.model)
    watched = Watched(modules)
    outcome = run(step, modules, watched)
    masks = masks_of(step)

    def find(watched: Watched, outcome: Outcome) -> Origin | None:
        return _first(watched, outcome, masks)[1]

    reached, origin = _first(watched, outcome, masks)
    if outcome.error and not outcome.outputs and (origin is not None or watched.went):
        reached, origin = "an error", origin or watched.went[0]
    update: Remedy | None = None
    if isinstance(origin, str):
        found = explain_leaf(step, origin)
        if optimizer is not None and origin.startswith("parameter "):
            name = origin.partition(" ")[2]
            text, update = explain_update(optimizer, name, dict(step.model.named_parameters())[name])
            found.what = f"{found.what} {text}".rstrip()
    elif origin is not None:
        found = _operation(origin)
    elif outcome.error:
        found = Explanation(
            "an error", f"run once more it ends with {outcome.error}; all before is finite.", name="error"
        )
    else:
        found = (
            (explain_loss(loss, outcome.outputs) if loss is not None else None)
            or (explain_optimizer(step, optimizer) if optimizer is not None else None)
            or explain_underflow(step, outcome, remedies)
            or explain_rounding(step, remedies)
            or Explanation("nothing", _all_finite(outcome))
        )
    if remedies and origin is not None:
        found.remedies = [update] if update is not None else _tried(step, origin, find)
        if not outcome.went_backward:
            found.notes.append("the gradients of the outputs are not known: remedies were tried in the forward alone")
    found.reached = found.reached or reached
    if outcome.error and origin is not None:
        found.notes.append(f"the step ended with {outcome.error}")
    found.notes += [f"not seen: {each}" for each in dict.fromkeys(watched.unseen)]
    return found


def _first(watched: Watched, outcome: Outcome, masks: set[str]) -> tuple[str, Origin | None]:
    """Returns what is not finite first, in the order of the step, and where that came from."""
    for number, output in enumerate(outcome.outputs):
        if not is_finite(output) and (origin := origin_of(output, watched, masks, False)) is not None:
            return f"output {number}", origin
    if outcome.loss is not None and not is_finite(outcome.loss):
        origin = origin_of(outcome.loss, watched, masks, False)
        if origin is not None:
            return "the loss", origin
    found: list[tuple[str, Origin]] = []
    for name, gradient in outcome.gradients.items():
        if gradient is not None and not is_finite(gradient):
            origin = origin_of(gradient, watched, masks, True)
            found += [(f"the gradient of {name}", origin)] if origin is not None else []
    if found:
        reached, origin = min(found, key=lambda each: each[1].number if isinstance(each[1], Went) else -1)
        if isinstance(origin, Went) and origin.phase == BACKWARD and cause_of(origin).kind == "NaN from inf":
            origin = overflow_behind(origin) or origin
        return reached, origin
    hidden = hidden_overflow(watched)
    return ("nothing that leaves the model: x / inf is 0" if hidden is not None else ""), hidden


def _operation(went: Went) -> Explanation:
    cause = cause_of(went)
    of = f"{went.name}, in the backward of {went.forward}" if went.phase == BACKWARD and went.forward else went.name
    return Explanation(
        cause.kind,
        f"{cause.kind}: {of}: {cause.text}",
        went.phase,
        went.name,
        went.forward,
        "" if went.module == IN_LOSS else went.module,
        went.line,
        operands=went.inputs,
        output=went.output,
        name="the labels" if went.took_labels else "",
        notes=["the model's outputs are finite: it is in what computes the loss"] if went.phase == LOSS else [],
    )


def _tried(step: Step, origin: Origin, find: Callable[[Watched, Outcome], Origin | None]) -> list[Remedy]:
    smaller = try_scale(step) if isinstance(origin, Went) and cause_of(origin).remedy == "scale" else None
    tried = [each for each in (smaller, try_fixes(step, origin, find)) if each is not None]
    if isinstance(origin, Went) and _is_half(origin) and not any(each.helps for each in tried):
        wider = try_paths(step, [origin.module])[0]  # a zero may have been a small number before: eps=1e-12, say
        tried += [wider] if wider.helps else []
    return sorted(tried, key=lambda each: not each.helps)


def _is_half(went: Went) -> bool:
    return went.module != IN_LOSS and any(each.dtype in ("float16", "bfloat16") for each in (*went.inputs, went.output))


def _all_finite(outcome: Outcome) -> str:
    parts = ["outputs"] + ["the loss"] * (outcome.loss is not None) + ["gradients"] * outcome.went_backward
    text = f"{' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)} are finite."
    if not outcome.went_backward:
        text += " Backward was not run: give loss= or output_gradients=."
    return text


def _context(context: Context | Mapping[str, torch.dtype] | None) -> Context:
    if callable(context):
        return context
    if context is None:
        types = {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
        context = {each: torch.get_autocast_dtype(each) for each in types if torch.is_autocast_enabled(each)}
    casts = dict(context)

    def make() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for device, dtype in casts.items():
            stack.enter_context(torch.autocast(device, dtype))
        return stack

    return make
