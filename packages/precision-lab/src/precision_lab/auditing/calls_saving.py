"""Checkpoints that a loop writes: which tensors in which dtype, and whether the scaler's state is in them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def saving_calls() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yields which function of which module is called through which function."""
    yield torch, "save", _save
    if importlib.util.find_spec("safetensors") is not None:
        import safetensors.torch

        yield safetensors.torch, "save_file", _save_file


def _save(recorder: Recorder, original: Any, obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(obj, f, *args, **kwargs)
    _note_saved(recorder, obj, f)
    return result


def _save_file(recorder: Recorder, original: Any, tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(tensors, filename, *args, **kwargs)
    _note_saved(recorder, tensors, filename)
    return result


def _note_saved(recorder: Recorder, obj: Any, file: Any) -> None:
    tensors: dict[str, torch.dtype] = {}
    numbers: list[float] = []
    has_scaler = has_optimizer = False

    def walk(value: Any, path: str, depth: int = 0) -> None:
        nonlocal has_scaler, has_optimizer
        if isinstance(value, torch.amp.GradScaler):
            has_scaler = True
        elif isinstance(value, (nn.Module, Optimizer)):
            walk(value.state_dict(), path, depth + 1)
        elif isinstance(value, Tensor):
            tensors[path] = value.dtype
        elif isinstance(value, float):
            numbers.append(value)
        elif isinstance(value, dict) and depth < 8:
            has_scaler |= set(value) >= _SCALER_KEYS
            has_optimizer |= set(value) >= {"state", "param_groups"}
            for key, each in value.items():
                walk(each, f"{path}.{key}" if path else str(key), depth + 1)
        elif isinstance(value, (list, tuple)) and depth < 8:
            for number, each in enumerate(value):
                walk(each, f"{path}.{number}", depth + 1)

    walk(obj, "")
    name = getattr(file, "name", file)
    file = str(name) if isinstance(name, (str, os.PathLike)) else "the checkpoint"
    recorder.note("saved", file=file, tensors=tensors, scaler=has_scaler, optimizer=has_optimizer, numbers=numbers)
