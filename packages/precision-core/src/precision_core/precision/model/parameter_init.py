"""Parameters that are born in a dtype, while their module is built."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from precision_core.policy.casting import cast, map_tensors
from precision_core.precision.model.aligned import tensors

_NO_KERNEL = ("not implemented for", "Low precision dtypes")
"""What torch says where it has no kernel for a dtype."""


class _Float32WhereNeeded(TorchFunctionMode):
    """Context in which calls for which torch has no half kernel (factorisations, `nn.init.orthogonal_`) use float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:  # NotImplementedError is one
            halves = {t.dtype for t in tensors((args, kwargs)) if t.dtype in (torch.float16, torch.bfloat16)}
            if not halves or not any(words in str(error) for words in _NO_KERNEL):
                raise
        (half,) = halves if len(halves) == 1 else (torch.float32,)
        wide: dict[Tensor, Tensor] = {}
        wide_args, wide_kwargs = map_tensors(
            (args, kwargs), lambda t: wide.setdefault(t, t.float()) if t.dtype in halves else t
        )
        result = func(*wide_args, **wide_kwargs)
        if getattr(func, "__name__", "").endswith("_"):
            for tensor, new in wide.items():  # what it was to change in place
                tensor.copy_(new)
            return args[0]
        return map_tensors(result, lambda t: t.to(half) if t.dtype is torch.float32 else t)


@contextmanager
def parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Casts each floating parameter that this thread registers on a module.

    Initialisers that torch has no half kernel for run in float32, and what they return is rounded.
    """
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() == thread and param is not None:
            param.data = cast(param.data, dtype)
        return param

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        with _Float32WhereNeeded():
            yield
    finally:
        handle.remove()
