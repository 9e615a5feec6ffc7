"""A step that is finite, and not what it would be in float64: the first module whose output is far off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from precision_lab.explaining.explanation import Explanation
from precision_lab.explaining.numbers import numbers_of, percent, tensors
from precision_lab.explaining.remedies import try_paths
from precision_lab.explaining.replay import Step, run
from precision_lab.explaining.watched import Modules
from precision_lab.explaining.wide import Wide

FAR = 0.25
"""Relative error of an output from which on rounding is the finding: half formats give some hundredths."""
_JUMP = 4.0
"""A module is the first to be far off if its error is so many times that of all before it."""


def explain_rounding(step: Step, remedies: bool) -> Explanation | None:
    """Returns the explanation where an output is far from what float64 gives, None where none is."""
    step = replace(step, dropout=False)
    ours, outputs = _outputs(step, None)
    exact, true = _outputs(step, torch.float64)
    if ours.keys() != exact.keys() or len(outputs) != len(true):  # other calls were made, or random ones
        return None
    errors = {key: _error(ours[key], exact[key]) for key in ours}
    error = _all(outputs, true)
    if error < FAR or not errors:
        return None
    before = 0.0
    first = None
    for key, value in errors.items():
        if value >= FAR / 2 and value > _JUMP * before:
            first = key
            break
        before = max(before, value)
    if first is None:  # it is none of the modules': a mean of values that are nearly zero, say
        return None
    path, call = first
    found = Explanation(
        "rounding",
        f"the output is {percent(min(error, 1.0))} off what float64 gives, and {path or 'the model'} is the first: "
        f"its output is off by {errors[path, call]:.2g} (relative), those before it by {before:.2g} at most.",
        "forward",
        module=path,
        operands=[numbers_of(ours[path, call])],
        output=numbers_of(exact[path, call]),
        reached="output 0",
    )
    if remedies and path:
        remedy, outputs = try_paths(step, [path])
        better = _all(outputs, true)
        remedy.outcome = "finite" if better < error / 2 else f"still {percent(min(better, 1.0))} off"
        found.remedies = [remedy]
    return found


def _outputs(step: Step, dtype: torch.dtype | None) -> tuple[dict[tuple[str, int], Tensor], list[Tensor]]:
    """Returns the output of each call of each leaf module, and those of the model."""
    modules = Modules(step.model)
    found: dict[tuple[str, int], Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        path = modules.names.get(id(module))
        if path is None or any(True for _ in module.children()):
            return
        tensor = next((each for each in tensors(output) if each.is_floating_point()), None)
        if tensor is not None:
            call = sum(1 for name, _ in found if name == path)
            found[path, call] = tensor.detach()

    hook = register_module_forward_hook(keep)
    try:
        wide = Wide(modules, [""], dtype) if dtype is not None else None
        outcome = run(step, modules, wide=wide, backward=False)
    finally:
        hook.remove()
    if outcome.random:  # of which each dtype draws other numbers; CUDA's generator is not asked
        return {}, []
    return found, [each.detach() for each in outcome.outputs]


def _all(outputs: list[Tensor], true: list[Tensor]) -> float:
    if len(outputs) != len(true) or not true:
        return 0.0
    return _error(*(torch.cat([each.detach().double().flatten() for each in of]) for of in (outputs, true)))


def _error(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape or not value.numel():
        return 0.0
    value, exact = value.detach(), exact.detach().to(torch.float64)
    norm = float(exact.norm())
    return float((value.to(torch.float64) - exact).norm()) / norm if norm else 0.0
