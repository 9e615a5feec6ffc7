"""Calls that set torch's switches for products in float32, and the dtype that everything is made in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from precision_lab.auditing.holds import HALVES

if TYPE_CHECKING:
    from precision_lab.auditing.recorder import Recorder

_OPERATIONS = {"matmul": "matmul", "conv": "conv", "all": "all"}
"""Operations of torch's setting by operation that this is about; recurrent ones are not told from the others."""


def switch_calls() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yields which function or attribute is set through which function."""
    yield torch, "set_float32_matmul_precision", _matmul_precision
    yield type(torch.backends.cuda.matmul), "__setattr__", _matmul_switch
    yield vars(type(torch.backends.cudnn))["allow_tf32"], "setter", _cudnn_switch
    if hasattr(torch._C, "_set_fp32_precision_setter"):
        yield torch._C, "_set_fp32_precision_setter", _by_operation
    yield torch, "set_default_dtype", _default_dtype


def _matmul_precision(recorder: Recorder, original: Any, precision: str) -> None:
    name = "torch.set_float32_matmul_precision"
    recorder.note("switches", name=name, value=precision, tf32=precision != "highest", of="matmul")
    original(precision)


def _matmul_switch(recorder: Recorder, original: Any, self: Any, name: str, value: Any) -> None:
    if name == "allow_tf32":
        recorder.note("switches", name=f"torch.backends.cuda.matmul.{name}", value=value, tf32=bool(value), of="matmul")
    original(self, name, value)


def _cudnn_switch(recorder: Recorder, original: Any, value: Any) -> None:
    recorder.note("switches", name="torch.backends.cudnn.allow_tf32", value=value, tf32=bool(value), of="conv")
    original(value)


def _by_operation(recorder: Recorder, original: Any, backend: str, operation: str, value: str) -> Any:
    if backend in ("cuda", "generic") and operation in _OPERATIONS and value in ("tf32", "ieee"):
        path = "" if backend == "generic" else ".cuda.matmul" if operation == "matmul" else ".cudnn"
        path += ".conv" if operation == "conv" else ""
        name = f"torch.backends{path}.fp32_precision"
        recorder.note("switches", name=name, value=value, tf32=value == "tf32", of=_OPERATIONS[operation])
    return original(backend, operation, value)


def _default_dtype(recorder: Recorder, original: Any, dtype: torch.dtype) -> None:
    if dtype in HALVES and torch.get_default_dtype() not in HALVES:
        recorder.note("default_dtype", dtype=dtype)
    original(dtype)
