"""Checkpoints that a loop writes: which tensors in which dtype, and whether the scaler's state is in them."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

WATCHED = "__precision_lab_watched__"
"""Attribute of a function that stands in another's place: one that was imported since is not replaced again."""
_PLAIN = (str, bytes, int, bool, type(None), torch.dtype, torch.device)
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def saving_calls() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yields which function of which module is called through which function."""
    yield torch, "save", _save
    yield pickle, "dump", _save
    yield pickle, "dumps", _save_bytes
    if importlib.util.find_spec("safetensors") is not None:
        import safetensors.torch

        yield safetensors.torch, "save_file", _save_file
        yield safetensors.torch, "save", _save_bytes


def late_saving_calls() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yields those of modules that scripts import when they need them: they are not imported for an audit."""
    for name in ("torch.distributed.checkpoint", "torch.distributed.checkpoint.state_dict_saver"):
        if (module := sys.modules.get(name)) is not None and hasattr(module, "async_save"):
            yield module, "save", _save_folder
            yield module, "async_save", _save_folder
    for name, function, call in _IMPORTED:
        module = sys.modules.get(name)
        if module is not None and function in vars(module) and not hasattr(vars(module)[function], WATCHED):
            yield module, function, call


def _save(recorder: Recorder, original: Any, obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(obj, f, *args, **kwargs)
    if not recorder.in_save:  # else a tensor of a folder
        _note_saved(recorder, obj, f)
    return result


def _save_bytes(recorder: Recorder, original: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(obj, *args, **kwargs)
    if not recorder.in_save:
        _note_saved(recorder, obj, None)
    return result


def _save_file(recorder: Recorder, original: Any, tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(tensors, filename, *args, **kwargs)
    _note_saved(recorder, tensors, filename)
    return result


def _save_arrays(recorder: Recorder, original: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(file, *args, **kwargs)
    _note_saved(recorder, kwargs, file)
    return result


def _save_folder(recorder: Recorder, original: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    if not recorder.in_save:
        _note_saved(recorder, state_dict, kwargs.get("checkpoint_id") or (args[0] if args else None))
    recorder.in_save += 1
    try:
        return original(state_dict, *args, **kwargs)
    finally:
        recorder.in_save -= 1


_IMPORTED: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("joblib", "dump", _save),
    ("cloudpickle", "dump", _save),
    ("dill", "dump", _save),
    ("numpy", "savez", _save_arrays),
    ("numpy", "savez_compressed", _save_arrays),
    ("transformers.modeling_utils", "safe_save_file", _save_file),
    ("peft.peft_model", "safe_save_file", _save_file),
    ("accelerate.utils.other", "safe_save_file", _save_file),
)
"""Modules that a script may import, or that have a name of their own for safetensors' function."""


def _note_saved(recorder: Recorder, obj: Any, file: Any) -> None:
    tensors: dict[str, torch.dtype] = {}
    numbers: list[float] = []
    has_scaler = has_optimizer = False

    def walk(value: Any, path: str, depth: int = 0) -> None:
        nonlocal has_scaler, has_optimizer
        if isinstance(value, torch.amp.GradScaler):
            has_scaler = True
        elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
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
        elif type(value).__name__ == "ndarray" and hasattr(torch, str(value.dtype)):
            tensors[path] = getattr(torch, str(value.dtype))
        elif (
            depth < 8 and not isinstance(value, (*_PLAIN, type)) and isinstance(getattr(value, "__dict__", None), dict)
        ):
            walk(vars(value), path, depth + 1)  # a dataclass, a namespace

    walk(obj, "")
    if not (tensors or has_scaler or has_optimizer):  # a tokenizer, a config
        return
    name = getattr(file, "name", file)
    file = str(name) if isinstance(name, (str, os.PathLike)) else "the checkpoint"
    recorder.note("saved", file=file, tensors=tensors, scaler=has_scaler, optimizer=has_optimizer, numbers=numbers)
