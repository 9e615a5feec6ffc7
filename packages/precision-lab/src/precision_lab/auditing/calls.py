"""Calls of torch that say how a loop treats its loss, its scaler and its checkpoints: replaced within a `with`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precision_lab.auditing.calls_model import model_calls
from precision_lab.auditing.calls_saving import WATCHED, late_saving_calls, saving_calls
from precision_lab.auditing.calls_scaler import scaler_calls
from precision_lab.auditing.calls_switches import switch_calls
from precision_lab.auditing.graph import loss_scale
from precision_lab.auditing.record import Context

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

Around = Callable[..., Any]


@contextmanager
def watch_calls(recorder: Recorder) -> Iterator[None]:
    """Context in which the calls in `_watched` are noted; afterwards everything is as it was."""
    with ExitStack() as stack:
        done = set[tuple[int, str]]()

        def watch(calls: Iterator[tuple[Any, str, Around]]) -> None:
            for owner, name, around in calls:
                if (id(owner), name) in done:
                    continue
                done.add((id(owner), name))
                original = vars(owner)[name]
                wrapped = _wrap(original, functools.partial(around, recorder), recorder)
                setattr(owner, name, wrapped)
                stack.callback(setattr, owner, name, original)

        watch(_watched())
        recorder.watch_late = lambda: watch(late_saving_calls())
        recorder.watch_late()
        yield


def _wrap(original: Any, around: Around, recorder: Recorder) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        # One that somebody imported while it was in place does nothing later.
        return around(original, *args, **kwargs) if recorder.running else original(*args, **kwargs)

    setattr(call, WATCHED, True)
    return call


def _watched() -> Iterator[tuple[Any, str, Around]]:
    yield torch.autocast, "__init__", _autocast_made
    yield torch.autocast, "__enter__", _autocast
    yield torch.autocast, "__exit__", _autocast_ends
    yield torch, "clear_autocast_cache", _cache_cleared
    yield torch.Tensor, "backward", _tensor_backward
    yield torch.autograd, "backward", _backward
    yield from model_calls()
    yield torch.autograd, "grad", _grad
    yield torch.autograd.graph.saved_tensors_hooks, "__enter__", _saved_hooks
    yield from scaler_calls()
    yield torch.optim.Optimizer, "__init__", _optimizer_made
    yield from switch_calls()
    yield from saving_calls()


def _autocast_made(recorder: Recorder, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    recorder.asked[self] = bool(args[2] if len(args) > 2 else kwargs.get("enabled", True))
    return original(self, *args, **kwargs)


def _autocast(recorder: Recorder, original: Any, self: Any) -> Any:
    if not recorder.in_update:
        recorder.note(
            "autocast",
            device=self.device,
            dtype=self.fast_dtype,
            enabled=self._enabled,
            asked=recorder.asked.get(self, self._enabled),
            cache=self._cache_enabled,
            inside=recorder.module_path(),
        )
    result = original(self)
    if not recorder.autocast:
        recorder.cache += 1
    if recorder.stack and self._enabled:
        recorder.root.data["within"][self.device] = self.fast_dtype
    recorder.autocast.append((self.device, self.fast_dtype) if self._enabled else (self.device, None))
    asked = recorder.asked.get(self, self._enabled)
    library = recorder.where.library(2)
    recorder.contexts.append(Context(self.device, self.fast_dtype, asked, self._enabled, library))
    return result


def _autocast_ends(recorder: Recorder, original: Any, self: Any, *error: Any) -> Any:
    if recorder.autocast:
        recorder.autocast.pop()
        recorder.contexts.pop()
    return original(self, *error)


def _cache_cleared(recorder: Recorder, original: Any) -> Any:
    recorder.cache += 1
    return original()


def _grad(recorder: Recorder, original: Any, *args: Any, **kwargs: Any) -> Any:
    if not recorder.in_backward:
        create = bool(kwargs.get("create_graph", len(args) > 4 and args[4]))
        recorder.note("autograd_grad", recorder.where.line(3), create_graph=create)
        result = original(*args, **kwargs)
        outputs = args[0] if args else kwargs["outputs"]
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        roots = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        found = loss_scale([each for each in roots if isinstance(each, Tensor)], recorder.scaled)
        line = recorder.where.line(3)
        event = recorder.note("assigned", line, ids=[], factor=found.factor, scaler=found.scaler)
        recorder.gradients.returned(inputs, result, event)
        return result
    return original(*args, **kwargs)


def _tensor_backward(recorder: Recorder, original: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _around_backward(recorder, [tensor], lambda: original(tensor, *args, **kwargs))


def _backward(recorder: Recorder, original: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    roots = [tensors] if isinstance(tensors, Tensor) else [each for each in tensors if isinstance(each, Tensor)]
    return _around_backward(recorder, roots, lambda: original(tensors, *args, **kwargs))


def _around_backward(recorder: Recorder, roots: list[Tensor], run: Callable[[], Any]) -> Any:
    if recorder.in_backward:
        return run()
    event = None
    if roots:
        found = loss_scale(roots, recorder.scaled)
        types = {"cpu", *recorder.record.devices}
        event = recorder.note(
            "backward",
            recorder.where.line(4),
            dtype=roots[0].dtype,
            device=roots[0].device.type,
            factor=found.factor,
            scaler=found.scaler,
            partly=found.partly,
            autocast=[each for each in sorted(types) if torch.is_autocast_enabled(each)],
            contexts=list(recorder.contexts),
            graph=roots[0].requires_grad,
            ids=[],
            fresh=[],
            products=[],
        )
    recorder.backward_line = event.line if event is not None else None
    recorder.before_backward(roots)
    recorder.in_backward += 1
    try:
        return run()
    finally:
        recorder.in_backward -= 1
        recorder.after_backward(event)


def _saved_hooks(recorder: Recorder, original: Any, self: Any) -> Any:
    recorder.checkpointed = True
    return original(self)


def _optimizer_made(recorder: Recorder, original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    recorder.counted.made(self)
