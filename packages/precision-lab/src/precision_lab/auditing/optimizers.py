"""An optimizer's step: what is noted of it before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder


def ids_of(optimizer: Any) -> list[int]:
    """Returns the ids of an optimizer's parameters."""
    return [id(param) for group in getattr(optimizer, "param_groups", ()) for param in group["params"]]


def note_step(recorder: Recorder, optimizer: Optimizer, closure: bool) -> None:
    """Notes that a step begins."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        if (name := recorder.names.param(param)) is not None:
            recorder.record.trained[name] = param.dtype
    scale = getattr(optimizer, "grad_scale", None)
    recorder.note(
        "step",
        optimizer=recorder.keep(optimizer),
        name=type(optimizer).__name__,
        ids=[id(param) for param in params],
        without=[id(param) for param in params if param.grad is None and param.requires_grad],
        closure=closure,
        scaler=recorder.scaler_steps[-1] if recorder.scaler_steps else None,
        grad_scale=float(scale) if scale is not None else None,
        cache=recorder.open_cache(),
    )
