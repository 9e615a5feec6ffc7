"""Calls that decide what a model's parameters are, and how their gradients are reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from precision_lab.auditing.holds import HALVES

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder


def model_calls() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yields what is replaced while a loop is observed: class, method, what is called in its place."""
    yield nn.Module, "_apply", _module_cast
    yield nn.Module, "load_state_dict", _loaded
    yield nn.Module, "register_parameter", _registered
    yield nn.parallel.DistributedDataParallel, "register_comm_hook", _comm_hook


def _module_cast(recorder: Recorder, original: Any, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if recorder.in_cast or torch.compiler.is_compiling():
        return original(self, *args, **kwargs)
    recorder.in_cast = True
    ids = [id(each) for each in self.parameters()]
    try:
        before = [each.dtype for each in (*self.parameters(), *self.buffers())]
        result = original(self, *args, **kwargs)
    finally:
        recorder.in_cast = False
    for old, new in zip(before, (*self.parameters(), *self.buffers()), strict=False):
        if old is not new.dtype and (old.is_floating_point or old.is_complex):
            path = recorder.names.path(self)
            recorder.note("module_cast", root=type(self).__name__, path=path, ids=ids, of=old, to=new.dtype)
            break
    return result


def _loaded(recorder: Recorder, original: Any, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """With assign=True parameters get the dtype of what was loaded."""
    before = [each.dtype for each in self.parameters()]
    result = original(self, *args, **kwargs)
    for old, new in zip(before, self.parameters(), strict=False):
        if old is not new.dtype:
            path, ids = recorder.names.path(self), [id(each) for each in self.parameters()]
            recorder.note("module_cast", root=type(self).__name__, path=path, ids=ids, of=old, to=new.dtype)
            break
    return result


def _registered(recorder: Recorder, original: Any, self: nn.Module, name: str, param: Any) -> None:
    original(self, name, param)
    if getattr(param, "dtype", None) in HALVES and not recorder.in_cast and not recorder.record.of("made_half"):
        recorder.note("made_half", dtype=param.dtype)


def _comm_hook(recorder: Recorder, original: Any, self: Any, state: Any, hook: Any) -> Any:
    recorder.note("comm_hook", name=getattr(hook, "__name__", type(hook).__name__))
    return original(self, state, hook)
