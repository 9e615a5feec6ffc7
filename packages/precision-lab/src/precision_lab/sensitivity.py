"""Sensitivity: what each module would lose in a narrower format, from one float64 forward, backward and step.

rounding   the loss moves by g * d where a value with the gradient g is rounded by d. Rounding errors have no common
           sign: of a module's outputs and parameters together it is the root of the sum of (g * d)^2.
range      the largest input, output and gradient, beside where the format ends.
updates    the share of the step that is below half the spacing of its parameter in the format: it rounds to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from precision_core.policy import dtype_name
from precision_lab.loop import Training

FORMATS = (torch.bfloat16, torch.float16)


@dataclass
class Layer:
    """One module that holds parameters, or has no modules inside; figures by format where they depend on it."""

    name: str
    kind: str = ""
    parameters: int = 0
    inputs: float = 0.0
    """The largest absolute value."""
    outputs: float = 0.0
    gradients: float = 0.0
    """With respect to its output."""
    rounding: dict[str, float] = field(default_factory=dict)
    """Format -> by how much the loss moves."""
    unchanged: dict[str, float] = field(default_factory=dict)
    """Format -> the share of its updates that round to nothing; empty without updates."""


def look(training: Training) -> list[dict[str, Any]]:
    """Returns each `Layer` as plain values, in the order of the model; `training` is in float64, and takes a step."""
    model, optimizer, task = training.model, training.optimizer, training.task
    layers = {name: Layer(name, type(module).__name__) for name, module in model.named_modules() if _counts(module)}
    squares = {name: dict.fromkeys(FORMATS, 0.0) for name in layers}
    handles = [
        module.register_forward_hook(_watch(layers[name], squares[name]), with_kwargs=True)
        for name, module in model.named_modules()
        if name in layers
    ]
    try:
        loss = task.compute_loss(model, training.fabric.to_device(next(task.stream(training.job.seed))))
        training.fabric.backward(loss)
    finally:
        for handle in handles:
            handle.remove()
    before = {}
    for name, param in model.named_parameters():
        owner = name.rpartition(".")[0]
        layers[owner].parameters += param.numel()
        if param.grad is not None and param.grad.layout is torch.strided:
            _add(squares[owner], param.detach(), param.grad)
            before[name] = param.detach().clone(), param.grad != 0
    _step(training)
    counts: dict[str, dict[torch.dtype, list[int]]] = {}
    params = dict(model.named_parameters())
    for name, (old, moves) in before.items():
        for dtype in FORMATS:
            swallowed = ((params[name].detach() - old).abs() < spacing(old, dtype) / 2) & moves
            count = counts.setdefault(name.rpartition(".")[0], {}).setdefault(dtype, [0, 0])
            count[0] += int(swallowed.sum())
            count[1] += int(moves.sum())
    optimizer.zero_grad()
    for name, layer in layers.items():
        layer.rounding = {dtype_name(dtype): _finite(math.sqrt(total)) for dtype, total in squares[name].items()}
        layer.unchanged = {
            dtype_name(dtype): same / seen for dtype, (same, seen) in counts.get(name, {}).items() if seen
        }
        for key in ("inputs", "outputs", "gradients"):
            setattr(layer, key, _finite(getattr(layer, key)))
    return [asdict(layer) for layer in layers.values()]


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the distance from each value to the next one of `dtype`."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal))  # |value| in [2^(e - 1), 2^e)
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent)


def _step(training: Training) -> None:
    """Takes one step at the rate that the schedule has in the middle of the run."""
    task, job = training.task, training.job
    if task.clip_norm is not None:
        training.fabric.clip_gradients(training.model, training.optimizer, max_norm=task.clip_norm)
    if task.schedule is not None:
        for group in training.optimizer.param_groups:
            group["lr"] *= task.schedule(job.steps // 2, job.steps)
    training.optimizer.step()


def _counts(module: nn.Module) -> bool:
    has_own = next(module.parameters(recurse=False), None) is not None
    return has_own or next(module.children(), None) is None


def _watch(layer: Layer, squares: dict[torch.dtype, float]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        layer.inputs = max([layer.inputs, *(_largest(each) for each in _floats((args, kwargs)))])
        for value in _floats(output):
            layer.outputs = max(layer.outputs, _largest(value))
            if value.requires_grad:
                value.register_hook(_after(value.detach(), layer, squares))

    return hook


def _after(value: Tensor, layer: Layer, squares: dict[torch.dtype, float]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        layer.gradients = max(layer.gradients, _largest(gradient))
        _add(squares, value, gradient)

    return hook


def _add(squares: dict[torch.dtype, float], value: Tensor, gradient: Tensor) -> None:
    for dtype in FORMATS:
        rounded = value.to(dtype).to(value.dtype)
        moved = torch.where(rounded.isfinite(), rounded - value, 0.0)  # what overflows is no matter of rounding
        squares[dtype] += float((moved * gradient).square().sum())


def _floats(values: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def _finite(value: float) -> float:
    return value if math.isfinite(value) else torch.finfo(torch.float64).max
