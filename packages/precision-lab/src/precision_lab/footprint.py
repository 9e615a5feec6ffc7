"""The memory of a training step in a mode, by kind, before any of it is allocated.

The task is made, set up by `Fabric` and trained for three steps with tensors that have no memory (`tracker`). The first
step makes the optimizer's state, the second finds the operation at which most is alive, the third is the same and looks
at what it is then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from precision_core import Fabric
from precision_lab.buckets import Buckets
from precision_lab.made import fake_batch, made
from precision_lab.pretended import pretended
from precision_lab.task import Task
from precision_lab.tracker import Tracker, fake_mode, key_of

KINDS = ("params", "grads", "master", "optimizer", "buffers", "activations", "temporary")
MASTERS = ("master_rest", "master_weight")
"""What bf16-master calls the other 16 bits of a weight, and 16-master its float32 value, in the optimizer's state."""
TRACED = {
    "single_device": "traced",
    "ddp": "traced on one device, with DDP's buckets of gradients",
    "fsdp": "traced as one of {} processes",
}
"""Strategy that can be traced -> how it is."""


@dataclass
class Footprint:
    """Bytes of one process, at the moment of a step when most is alive; the kinds add up to `peak`."""

    mode: str
    params: int = 0
    grads: int = 0
    master: int = 0
    """What is kept from step to step besides: master weights, or what of them is beside the weights; a loss scale."""
    optimizer: dict[str, int] = field(default_factory=dict)
    """Each of the optimizer's states."""
    buffers: int = 0
    activations: int = 0
    """Whatever the forward made, inputs and casts of weights included, and the task's own data."""
    temporary: int = 0
    """Whatever backward and the optimizer made and is no gradient yet."""
    peak: int = 0
    set_up: int = 0
    """The most that is alive before the first step, in the memory where the task makes the model, which is not always
    that of the device. Without what quantisation has for a moment."""
    resident: int = 0
    """Between two steps, once gradients are dropped: parameters, optimizer, buffers."""
    loaded: int = 0
    """Values of the model that the task's own code had in memory; 0 where it made it without."""
    numbers: int = 0
    """Of the model: elements of its parameters, and of those which train."""
    trained: int = 0
    how: str = "traced"
    """How it was traced, or the formula that it comes from."""
    strategy: str = "single_device"
    devices: int = 1
    reason: str = ""
    """Why there is no estimate."""

    def of(self, kind: str) -> int:
        """Returns the bytes of one of `KINDS`."""
        value = getattr(self, kind)
        return sum(value.values()) if isinstance(value, dict) else value


def trace(
    mode: str,
    make: Callable[[], Task],
    accelerator: str = "cpu",
    *,
    strategy: str = "single_device",
    devices: int = 1,
) -> Footprint:
    """Returns the footprint of one process.

    Args:
        strategy: "fsdp" is traced as rank zero of `devices`, of which the others are pretended; "ddp" on one device,
            with DDP's buckets.

    Raises:
        Exception: what set-up and training raise; code that reads a tensor's value raises
            DataDependentOutputException, since there is none.
    """
    if strategy != "fsdp":
        return _trace(mode, make, Fabric(accelerator, precision=mode), strategy, devices)
    with pretended(devices):
        fabric = Fabric(accelerator, strategy=strategy, devices=devices, precision=mode)
        try:
            return _trace(mode, make, fabric, strategy, devices)
        finally:
            fabric.teardown()


def _trace(mode: str, make: Callable[[], Task], fabric: Fabric, strategy: str, devices: int) -> Footprint:
    found = Footprint(mode, how=TRACED[strategy].format(devices), strategy=strategy, devices=devices)
    tracker = Tracker()
    with fake_mode(), tracker, tracker.resizes():
        fabric.seed_everything(0)
        tracker.phase = "task"
        task, found.loaded = made(make)
        tracker.phase = ""
        # Everything is on the device, and fake parameters, of which there are weak references, cannot be swapped.
        vars(task.model)["to"] = lambda *args, **kwargs: task.model
        with _not_fused(task.optimizer):
            model, optimizer = fabric.setup(task.model, task.optimizer)
        del vars(task.model)["to"]
        found.set_up = tracker.peak
        batches = task.stream(0)
        _step(fabric, task, tracker, next(batches))
        optimizer.zero_grad()
        tracker.phase = "buckets"
        buckets = Buckets(model, fabric.precision_plugin.policy) if strategy == "ddp" else None
        kept = {number for _, phase, number in tracker.alive.values() if phase not in ("task", "buckets")}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        params += list(model.parameters())  # those of FSDP2 are shards now, and gathered in a step
        different = {id(param): param for param in params}.values()
        found.numbers = sum(param.numel() for param in different)
        found.trained = sum(param.numel() for param in different if param.requires_grad)
        tracker.reset()
        _step(fabric, task, tracker, next(batches), buckets)
        peak, at = tracker.peak, tracker.peak_at
        optimizer.zero_grad()
        tracker.reset(at, lambda: _look(found, tracker, params, model, optimizer, kept))
        _step(fabric, task, tracker, next(batches), buckets)
    if tracker.peak != peak or found.peak != peak:
        raise RuntimeError(f"two steps of {mode} are not alike: they take {peak} and {tracker.peak} bytes")
    return found


@contextmanager
def _not_fused(optimizer: Any) -> Iterator[None]:
    """Context in which core does not try out a fused step, once for the process: fake numbers would be its answer."""
    before = [group.pop("fused", None) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, fused in zip(optimizer.param_groups, before, strict=True):
            group["fused"] = fused


def _step(fabric: Fabric, task: Task, tracker: Tracker, batch: Any, buckets: Buckets | None = None) -> None:
    model, optimizer = task.model, task.optimizer
    optimizer.zero_grad()
    tracker.phase = "forward"
    loss = task.compute_loss(model, fabric.to_device(fake_batch(batch)))
    tracker.phase = "backward"
    fabric.backward(loss)
    if buckets is not None:
        buckets.reduce()
    if task.clip_norm is not None:
        fabric.clip_gradients(model, optimizer, max_norm=task.clip_norm)
    optimizer.step()


def _look(
    found: Footprint, tracker: Tracker, params: list[Tensor], model: nn.Module, optimizer: Any, kept: set[int]
) -> None:
    """Fills in what is alive now, each storage once."""
    alive = copy.copy(tracker.alive)

    def take(tensor: Tensor | None) -> int:
        return alive.pop(key_of(tensor), (0,))[0] if tensor is not None else 0

    found.peak = tracker.peak  # what a kernel has only while it runs counts
    found.params = sum(take(param) for param in params)
    found.grads = sum(take(param.grad) for param in params)
    found.buffers = sum(take(buffer) for buffer in model.buffers())
    masters = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name in MASTERS:
                masters += take(value)
            elif isinstance(value, Tensor):
                found.optimizer[str(name)] = found.optimizer.get(str(name), 0) + take(value)
    rest = list(alive.values())
    found.master = masters + sum(size for size, _, number in rest if number in kept)
    found.resident = sum(found.of(kind) for kind in ("params", "master", "optimizer", "buffers"))
    found.activations = sum(size for size, phase, number in rest if number not in kept and phase in ("forward", "task"))
    found.temporary = sum(size for size, *_ in rest) - (found.master - masters) - found.activations
    found.temporary += found.peak - tracker.current
