"""Parameters that are born in a dtype, while their module is built."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from precision_core.casting import cast


@contextmanager
def parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Casts each floating parameter that this thread registers on a module."""
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() == thread and param is not None:
            param.data = cast(param.data, dtype)
        return param

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
