"""Calls of torch that say how a loop treats its loss, its scaler and its checkpoints: replaced within a `with`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from precision_lab.auditing.graph import loss_factor

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

Around = Callable[..., Any]


@contextmanager
def watch_calls(recorder: Recorder) -> Iterator[None]:
    """Context in which the calls in `_watched` are noted; afterwards everything is as it was."""
    with ExitStack() as stack:
        for owner, name, around in _watched():
            original = owner.__dict__[name]
            wrapped = _wrap(original, functools.partial(around, recorder), recorder)
            setattr(owner, name, wrapped)
            stack.callback(setattr, owner, name, original)
        yield


def _wrap(original: Any, around: Around, recorder: Recorder) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        # One that somebody imported while it was in place does nothing later.
        return around(original, *args, **kwargs) if recorder.running else original(*args, **kwargs)

    return call


def _watched() -> Iterator[tuple[Any, str, Around]]:
    yield torch.autocast, "__enter__", _autocast
    yield torch.autocast, "__exit__", _autocast_ends
    yield torch.Tensor, "backward", _tensor_backward
    yield torch.autograd, "backward", _backward
    yield nn.Module, "_apply", _module_cast
    yield nn.parallel.DistributedDataParallel, "register_comm_hook", _comm_hook
    yield torch.autograd.graph.saved_tensors_hooks, "__enter__", _saved_hooks
    scaler = torch.amp.GradScaler
    yield scaler, "scale", _scale
    yield scaler, "unscale_", _unscale
    yield scaler, "step", _scaler_step
    yield scaler, "update", _scaler_update
    for each in vars(lr_scheduler).values():
        if isinstance(each, type) and issubclass(each, lr_scheduler.LRScheduler) and "step" in vars(each):
            yield each, "step", _scheduler
    yield torch, "save", _save
    if importlib.util.find_spec("safetensors") is not None:
        import safetensors.torch

        yield safetensors.torch, "save_file", _save_file


def _autocast(recorder: Recorder, original: Any, self: Any) -> Any:
    if not recorder.in_step:
        recorder.note(
            "autocast",
            device=self.device,
            dtype=self.fast_dtype,
            enabled=self._enabled,
            cache=self._cache_enabled,
            inside=recorder.module_path(),
        )
    result = original(self)
    recorder.autocast.append((self.device, self.fast_dtype) if self._enabled else (self.device, None))
    return result


def _autocast_ends(recorder: Recorder, original: Any, self: Any, *error: Any) -> Any:
    if recorder.autocast:
        recorder.autocast.pop()
    return original(self, *error)


def _tensor_backward(recorder: Recorder, original: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _around_backward(recorder, [tensor], lambda: original(tensor, *args, **kwargs))


def _backward(recorder: Recorder, original: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    roots = [tensors] if isinstance(tensors, Tensor) else [each for each in tensors if isinstance(each, Tensor)]
    return _around_backward(recorder, roots, lambda: original(tensors, *args, **kwargs))


def _around_backward(recorder: Recorder, roots: list[Tensor], run: Callable[[], Any]) -> Any:
    if recorder.in_backward:
        return run()
    if roots:
        types = {"cpu", *recorder.record.devices}
        recorder.note(
            "backward",
            recorder.where.line(4),
            dtype=roots[0].dtype,
            factor=loss_factor(roots[0]),
            autocast=[each for each in sorted(types) if torch.is_autocast_enabled(each)],
            graph=roots[0].requires_grad,
        )
    recorder.before_backward(roots)
    recorder.in_backward += 1
    try:
        return run()
    finally:
        recorder.in_backward -= 1
        recorder.after_backward()


def _module_cast(recorder: Recorder, original: Any, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if recorder.in_cast or torch.compiler.is_compiling():
        return original(self, *args, **kwargs)
    recorder.in_cast = True
    try:
        before = [each.dtype for each in (*self.parameters(), *self.buffers())]
        result = original(self, *args, **kwargs)
    finally:
        recorder.in_cast = False
    for old, new in zip(before, (*self.parameters(), *self.buffers()), strict=False):
        if old is not new.dtype and old.is_floating_point:
            recorder.note("module_cast", root=type(self).__name__, path=recorder.names.path(self), of=old, to=new.dtype)
            break
    return result


def _comm_hook(recorder: Recorder, original: Any, self: Any, state: Any, hook: Any) -> Any:
    recorder.note("comm_hook", name=getattr(hook, "__name__", type(hook).__name__))
    return original(self, state, hook)


def _saved_hooks(recorder: Recorder, original: Any, self: Any) -> Any:
    recorder.checkpointed = True
    return original(self)


def _scale(recorder: Recorder, original: Any, self: Any, outputs: Any) -> Any:
    result = original(self, outputs)
    if self.is_enabled():
        recorder.note("scale", scaler=recorder.keep(self), scale=self.get_scale())
    return result


def _unscale(recorder: Recorder, original: Any, self: Any, optimizer: Any) -> Any:
    if self.is_enabled():
        recorder.note("unscale", scaler=recorder.keep(self), optimizer=recorder.keep(optimizer))
    return original(self, optimizer)


def _scaler_step(recorder: Recorder, original: Any, self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    if not self.is_enabled():
        return original(self, optimizer, *args, **kwargs)
    event = recorder.note(
        "scaler_step", scaler=recorder.keep(self), optimizer=recorder.keep(optimizer), ran=False, ids=[]
    )
    before = len(recorder.record.of("step"))
    result = original(self, optimizer, *args, **kwargs)
    event.data["ran"] = len(recorder.record.of("step")) > before
    if not event.ran:
        recorder.attempted(optimizer)
    return result


def _scaler_update(recorder: Recorder, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.is_enabled():
        recorder.note("scaler_update", scaler=recorder.keep(self))
    return original(self, *args, **kwargs)


def _scheduler(recorder: Recorder, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if "_initial_step" not in recorder.where.functions(3):
        recorder.note("scheduler", scheduler=recorder.keep(self), optimizer=id(getattr(self, "optimizer", None)))
    return original(self, *args, **kwargs)


def _save(recorder: Recorder, original: Any, obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(obj, f, *args, **kwargs)
    _note_saved(recorder, obj, f)
    return result


def _save_file(recorder: Recorder, original: Any, tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(tensors, filename, *args, **kwargs)
    _note_saved(recorder, tensors, filename)
    return result


_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def _note_saved(recorder: Recorder, obj: Any, file: Any) -> None:
    tensors: dict[str, torch.dtype] = {}
    found = {"scaler": False, "optimizer": False}

    def walk(value: Any, path: str, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value.dtype
        elif isinstance(value, dict) and depth < 8:
            found["scaler"] |= set(value) >= _SCALER_KEYS
            found["optimizer"] |= set(value) >= {"state", "param_groups"}
            for key, each in value.items():
                walk(each, f"{path}.{key}" if path else str(key), depth + 1)
        elif isinstance(value, (list, tuple)) and depth < 8:
            for number, each in enumerate(value):
                walk(each, f"{path}.{number}", depth + 1)

    walk(obj, "")
    recorder.note("saved", file=str(getattr(file, "name", file)), tensors=tensors, **found)
