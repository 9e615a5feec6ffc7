"""Signal to noise of each layer: one batch, forward and backward, in a mode and in float64, from the same weights.

For a leaf module's output x and the float64 run's X: 10 log10(sum X^2 / sum (x - X)^2) decibels, and the same of the
gradient with respect to it. 6 decibels are one bit: float32 comes to about 140, bfloat16 to about 50, and at 0 there is
as much noise as signal. The weights are those of the start, where all modes have the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from precision_core import Fabric
from precision_lab.loop import Job
from precision_lab.lora import LoRA
from precision_lab.task import Task
from precision_lab.variants import split_variants

SAMPLE = 2**16
"""Elements of an output that are compared, evenly spread: a large model's would not fit beside it."""
MOST = 320.0
"""Decibels, what float64 itself comes to: two results that are equal are not infinitely good."""
GROWTH = 4.0
"""By how much more than depth explains (the root of the number of layers) noise has to grow to be marked."""

Samples = dict[str, Tensor]


def noise(job: Job, make: Callable[[], Task]) -> list[tuple[str, float | None, float | None]]:
    """Returns (module, decibels of its output, of the gradient) in the order of the forward; None: not comparable."""
    outputs, gradients = _run(job, make, "64-true")
    mine, my_gradients = _run(job, make, split_variants(job.mode)[0])
    return [
        (name, decibels(mine[name], outputs[name]), decibels(my_gradients.get(name), gradients.get(name)))
        for name in outputs
        if name in mine
    ]


def decibels(sample: Tensor | None, reference: Tensor | None) -> float | None:
    """Returns 10 log10 of the reference's energy over that of the difference, at most `MOST`.

    None for shapes that differ, for no energy at all, and for values that are not finite in the reference; -MOST where
    the sample's are not.
    """
    if sample is None or reference is None or sample.shape != reference.shape:
        return None
    signal, error = reference.square().sum().item(), (sample - reference).square().sum().item()
    if signal == 0 or not math.isfinite(signal):
        return None
    if not math.isfinite(error):
        return -MOST
    return MOST if error == 0 else max(-MOST, min(MOST, 10 * math.log10(signal / error)))


def first_excess(layers: list[float | None], roundoff: float = 0.0) -> int | None:
    """Returns the first layer whose noise is more than depth explains, None where there is none.

    Independent rounding errors add up as the root of their number: after layer n the noise may be sqrt(n / (n - 1))
    times the most so far, which is the format's unit `roundoff` at least. `GROWTH` times that is marked.
    """
    most = roundoff
    for index, value in enumerate(layers):
        if value is None:
            continue
        amplitude = 10 ** (-value / 20)
        if most and amplitude > GROWTH * most * math.sqrt((index + 1) / max(1, index)):
            return index
        most = max(most, amplitude)
    return None


def _run(job: Job, make: Callable[[], Task], mode: str) -> tuple[Samples, Samples]:
    fabric = Fabric(job.accelerator, job.strategy, job.devices, mode)
    fabric.seed_everything(job.seed)
    task = make()
    model, optimizer = fabric.setup(task.model, task.optimizer)
    outputs: Samples = {}
    gradients: Samples = {}
    scale = fabric.precision_plugin.scale

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            gradients[name] = sampled(grad) / scale

        return hook

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point() or name in outputs:
                return
            outputs[name] = sampled(output)
            if output.requires_grad:
                output.register_hook(keep(name))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in leaves_of(model)]
    try:
        fabric.seed_everything(job.seed)
        batch = fabric.to_device(next(task.stream(job.seed)))
        fabric.backward(task.compute_loss(model, batch))
        optimizer.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
    return outputs, gradients


def leaves_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules without others inside, by name; a layer with its adapter is one, as it is without."""
    children = [] if isinstance(model, LoRA) else list(model.named_children())
    if not children:
        yield prefix, model
    for name, child in children:
        yield from leaves_of(child, f"{prefix}.{name}" if prefix else name)


def sampled(tensor: Tensor) -> Tensor:
    """Returns up to `SAMPLE` of the elements in float64 on the CPU, by position and so the same of every run."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].to("cpu", torch.float64)
