"""Gradients of modules that are zero in the format of the step, and are not in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from precision_lab.explaining.explanation import Explanation, Remedy
from precision_lab.explaining.numbers import numbers_of, tensors
from precision_lab.explaining.remedies import result
from precision_lab.explaining.replay import Outcome, Step, run
from precision_lab.explaining.watched import BACKWARD, IN_LOSS, Modules, Watched, Went, in_float64
from precision_lab.explaining.wide import Wide

_SHARE = 0.9
"""Share of a parameter's gradient that is zero and would not be in float64, from which on it underflowed."""
_NOISE = 1e-12
"""Of the operands: what is smaller is float64's own rounding, of a gradient that is zero."""


class Vanishing(Watched):
    """The mode in which operations of backward are noted that give zeros, and would not in float64."""

    def _note(self, func: Any, name: str, args: Any, before: Any, kwargs: Any, result: Any, node: Any) -> None:
        if node is None or self.modules.stack:
            return
        output = next((each for each in tensors(result) if each.is_floating_point() and each.itemsize < 8), None)
        if output is None or _zeros(output) <= _SHARE:
            return
        wide = in_float64(func, before, kwargs)
        if wide is None or wide.zeros > 1 - _SHARE or wide.largest > torch.finfo(output.dtype).smallest_normal:
            return
        operands = [numbers_of(each) for each in tensors((before, kwargs)) if each.is_floating_point()]
        if wide.largest < _NOISE * max((each.largest for each in operands), default=0.0):
            return
        _, forward, module, line = self.place(node)
        went = Went(self.number, name, module, BACKWARD, line, forward, operands, numbers_of(output))
        went.wide = wide
        self.went.append(went)


def _first(step: Step) -> Went | None:
    modules = Modules(step.model)
    watched = Vanishing(modules)
    run(step, modules, watched)
    return watched.went[0] if watched.went else None


def explain_underflow(step: Step, outcome: Outcome, remedies: bool) -> Explanation | None:
    """Returns the explanation where gradients of whole parameters underflowed; None where none did."""
    suspects = [name for name, each in outcome.gradients.items() if each is not None and _zeros(each) > _SHARE]
    if not suspects:
        return None
    exact = _in_float64(step)
    lost = [name for name in suspects if _lost(outcome.gradients[name], exact.get(name)) > _SHARE]
    if not lost:
        return None
    went = _first(step)
    if went is None or went.wide is None:
        return None
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in lost))
    # Backward reaches the last module first.
    name = next(each for each in reversed(lost) if each.rpartition(".")[0] == modules[-1])
    gradient, true = outcome.gradients[name], exact[name]
    assert gradient is not None and true is not None
    of = f" in the backward of {went.forward}" if went.forward else ""
    end = torch.finfo(getattr(torch, went.output.dtype)).smallest_normal
    found = Explanation(
        "gradient underflow",
        f"{went.name}{of} gives zeros, and in float64 {went.wide.smallest:.3g} to {went.wide.largest:.3g}: "
        f"{went.output.dtype} ends at {end:.3g}. The gradient of {name} is zero ({numbers_of(gradient)}), and reaches "
        f"{numbers_of(true).largest:.3g} in float64; so it is with {len(lost)} of {len(outcome.gradients)} parameters.",
        "backward",
        went.name,
        went.forward,
        "" if went.module == IN_LOSS else went.module,
        went.line,
        name=name,
        operands=went.inputs,
        output=went.output,
        reached=f"the gradient of {name}",
    )
    if remedies:
        found.remedies = [each for each in (_scaled(step, lost), _wider(step, modules, lost)) if each is not None]
    return found


def _scaled(step: Step, names: list[str]) -> Remedy | None:
    for power in (8, 12, 16, 20, 24):
        gradients = step.output_gradients
        if gradients is not None:
            gradients = [each if each is None else each.float() * 2.0**power for each in gradients]
        outcome = run(replace(step, output_gradients=gradients, scale=step.scale * 2.0**power), Modules(step.model))
        if outcome.finite and all(_zeros(outcome.gradients[name]) < _SHARE for name in names):
            return Remedy(
                "scale",
                f'a loss scale of {2**power:,} times this one: precision="16-mixed" has one',
                f"torch.amp.GradScaler(init_scale=2.0**{power}), and scaler.scale(loss).backward()",
                "finite",
            )
    return None


def _wider(step: Step, paths: list[str], names: list[str]) -> Remedy | None:
    modules = Modules(step.model)
    outcome = run(step, modules, wide=Wide(modules, [""], torch.float32, leaves=True))
    if outcome.finite and any(_zeros(outcome.gradients[name]) >= _SHARE for name in names):
        return None
    text = 'precision="bf16-mixed", whose range is float32\'s'
    return Remedy("exception", text, "torch.autocast(device_type, torch.bfloat16)", result(outcome))


def _in_float64(step: Step) -> dict[str, Tensor | None]:
    modules = Modules(step.model)
    return run(step, modules, wide=Wide(modules, [""], torch.float64, leaves=True)).gradients


def _zeros(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None or not gradient.numel() else float((gradient == 0).double().mean())


def _lost(gradient: Tensor | None, true: Tensor | None) -> float:
    if gradient is None or true is None or not gradient.numel():
        return 0.0
    return float(((gradient == 0) & (true != 0)).double().mean())
