"""Models without values: parameters are created on the meta device, buffers are not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Moves each parameter that this thread registers on a module to the meta device; initialising it is free then.

    Buffers keep what the module computes: position tables are in no checkpoint. One parameter of two modules stays one,
    lazy ones stay lazy.
    """
    thread = threading.get_ident()
    on_meta: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> the one in its place

    def hook(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() != thread or param is None or param.is_meta or is_lazy(param):
            return param
        if param not in on_meta:
            on_meta[param] = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        new: nn.Parameter = on_meta[param]
        return new

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
