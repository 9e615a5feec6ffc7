"""Calls of a gradient scaler, and of schedulers, which have to follow what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from precision_lab.auditing.optimizers import state_of

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder


def scaler_calls() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yields which method of which class is called through which function."""
    scaler = torch.amp.GradScaler
    yield scaler, "scale", _scale
    yield scaler, "get_scale", _get_scale
    yield scaler, "unscale_", _unscale
    yield scaler, "step", _scaler_step
    yield scaler, "update", _scaler_update
    for each in vars(lr_scheduler).values():
        if isinstance(each, type) and issubclass(each, lr_scheduler.LRScheduler) and "step" in vars(each):
            yield each, "step", _scheduler


def _scale(recorder: Recorder, original: Any, self: Any, outputs: Any) -> Any:
    result = original(self, outputs)
    if self.is_enabled():
        scaler, scale = recorder.keep(self), float(self._scale)
        recorder.note("scale", scaler=scaler, scale=scale)
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, Tensor) and each.grad_fn is not None:
                recorder.scaled[each.grad_fn._sequence_nr()] = scaler, scale
    elif recorder.record.count("scaler_off") == 0:
        recorder.note("scaler_off")
    return result


def _get_scale(recorder: Recorder, original: Any, self: Any) -> Any:
    recorder.note("scale_read", scaler=recorder.keep(self))
    return original(self)


def _unscale(recorder: Recorder, original: Any, self: Any, optimizer: Any) -> Any:
    if not self.is_enabled():
        return original(self, optimizer)
    recorder.gradients.settle()
    scaler, within = recorder.keep(self), bool(recorder.scaler_steps)
    event = recorder.note(
        "unscale", scaler=scaler, optimizer=recorder.keep(optimizer), within=within, ran=None, **state_of(optimizer)
    )
    result = original(self, optimizer)
    event.data["ran"] = True
    return result


def _scaler_step(recorder: Recorder, original: Any, self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    if not self.is_enabled():
        return original(self, optimizer, *args, **kwargs)
    recorder.gradients.settle()
    scaler = recorder.keep(self)
    event = recorder.note(
        "scaler_step", scaler=scaler, optimizer=recorder.keep(optimizer), ran=None, **state_of(optimizer)
    )
    before = len(recorder.record.of("step"))
    recorder.scaler_steps.append(scaler)
    try:
        result = original(self, optimizer, *args, **kwargs)
    finally:
        recorder.scaler_steps.pop()
    event.data["ran"] = len(recorder.record.of("step")) > before
    if not event.ran:
        recorder.attempted(optimizer)
    return result


def _scaler_update(recorder: Recorder, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if not self.is_enabled():
        return original(self, *args, **kwargs)
    event = recorder.note("scaler_update", scaler=recorder.keep(self), ran=None)
    result = original(self, *args, **kwargs)
    event.data["ran"] = True
    return result


def _scheduler(recorder: Recorder, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if "_initial_step" not in recorder.where.functions(3):
        recorder.note("scheduler", scheduler=recorder.keep(self), optimizer=id(getattr(self, "optimizer", None)))
    return original(self, *args, **kwargs)
