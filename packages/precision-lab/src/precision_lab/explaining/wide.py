"""Runs modules in a wider dtype, as an exception of a policy would, or one operation with its operands mended."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from precision_lab.auditing.where import Line, Where
from precision_lab.explaining.watched import IN_LOSS, Modules

_AS_THEY_ARE = frozenset(
    [
        "__get__",
        "__set__",
        "grad",
        "backward",
        "_set_grad_enabled",
        "set_grad_enabled",
        "detach_",
        "requires_grad_",
        "register_hook",
        "numel",
        "size",
        "dim",
        "stride",
        "is_floating_point",
        "is_complex",
        "__len__",
        "storage_offset",
        "data_ptr",
        "untyped_storage",
        "__setitem__",
        "is_autocast_enabled",
        "get_autocast_dtype",
        "set_autocast_enabled",
        "set_autocast_dtype",
        "manual_seed",
        "get_rng_state",
        "set_rng_state",
        "_functorch_wrapper_str_intern",
        "__repr__",
        "__hash__",
    ]
)
_NARROWING = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}
_SPELLED = re.compile(r"\bfloat16\b|\bbfloat16\b|\bhalf\b")
Mend = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Patch:
    """Operands of one call, found by its name (no names: of any), module and line, are mended."""

    functions: frozenset[str]
    module: str
    line: Line | None
    mend: Mend


class Wide(TorchFunctionMode):
    """The mode under which torch's functions, within the modules `paths`, take and give `dtype`, without autocast.

    "" is the whole model. What comes out of such a module stays wide; outside of autocast, functions around that
    take a narrow parameter cast it, as layers of core's `-true` modes do. With `leaves`, gradients of wide copies of
    the parameters are to be asked for: they are not rounded to the parameters' dtype. `replaced` has other tensors for
    some, by id.
    """

    def __init__(
        self,
        modules: Modules,
        paths: Collection[str],
        dtype: torch.dtype = torch.float32,
        leaves: bool = False,
        patches: Collection[Patch] = (),
        replaced: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.modules = modules
        self.paths = frozenset(paths)
        self.dtype = dtype
        self.patched = 0
        self.narrowed: set[Line] = set()  # lines that name a narrow dtype, which no policy changes
        self.needed = False  # whether anything else was narrow
        self._leaves: dict[int, Tensor] | None = {} if leaves else None
        self._patches = tuple(patches)
        self._replaced = dict(replaced or {})
        self._where = Where()

    def leaf(self, param: Tensor) -> Tensor:
        """Returns what to ask the gradient of in place of a parameter."""
        param = self._replaced.get(id(param), param)
        return param if self._leaves is None else self._leaves.get(id(param), param)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _AS_THEY_ARE:
            return func(*args, **kwargs)
        if self._replaced:
            args, kwargs = self._exchanged(args), {key: self._exchanged(value) for key, value in kwargs.items()}
        for patch in self._patches:
            named = name in patch.functions or not patch.functions
            if named and patch.module == self.modules.path and self._where.line(2) == patch.line:
                args, kwargs = patch.mend(args, kwargs)
                self.patched += 1
        if not self._here():
            if self.paths:
                args, kwargs = self._as_the_parameters(args, kwargs)
            return func(*args, **kwargs)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and isinstance(args[0], Tensor) and self._is_narrow(args[0].dtype):
            return func(*args, **kwargs)
        self._see(name, args, kwargs)
        args, kwargs = self._widened(args), {key: self._widened(value) for key, value in kwargs.items()}
        if name in _NARROWING and self._is_narrow(_NARROWING[name]):
            return args[0].to(self.dtype)
        with torch.autocast(_device(args, kwargs), torch.bfloat16, enabled=False):
            return func(*args, **kwargs)

    def _see(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes a cast that the user's line spells out, and whether anything else is narrow."""
        given = [*args, *kwargs.values()]
        cast = name in _NARROWING and self._is_narrow(_NARROWING[name])
        if cast or any(isinstance(each, torch.dtype) and self._is_narrow(each) for each in given):
            line = self._where.line(3)
            if line is not None and _SPELLED.search(line.text.partition("#")[0]):
                self.narrowed.add(line)
                return
        tensors = [each for each in given if isinstance(each, Tensor)]
        self.needed |= any(self._is_narrow(each.dtype) for each in tensors)
        self.needed |= self.dtype.itemsize > 4 or any(torch.is_autocast_enabled(each.device.type) for each in tensors)

    def _as_the_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Casts what came out of wide modules to the dtype of the parameter that it meets."""
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        stored = next((each for each in given if isinstance(each, nn.Parameter)), None)
        if stored is None or not self._is_narrow(stored.dtype):
            return args, kwargs
        if self.dtype == torch.float32 and torch.is_autocast_enabled(stored.device.type):  # which casts by itself
            return args, kwargs
        dtype = stored.dtype

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype == self.dtype else value

        return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}

    def _exchanged(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._replaced.get(id(value), value)
        return type(value)(self._exchanged(each) for each in value) if type(value) in (list, tuple) else value

    def _here(self) -> bool:
        path = self.modules.path
        if path == IN_LOSS:
            return IN_LOSS in self.paths
        return any(not each or path == each or path.startswith(f"{each}.") for each in self.paths)

    def _is_narrow(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not self._is_narrow(value.dtype) or value.layout is not torch.strided:
                return value
            if self._leaves is not None and isinstance(value, nn.Parameter):
                if id(value) not in self._leaves:
                    wide = value.detach().to(self.dtype)
                    self._leaves[id(value)] = wide.requires_grad_(value.requires_grad)
                return self._leaves[id(value)]
            return value.to(self.dtype)
        if isinstance(value, torch.dtype):
            return self.dtype if self._is_narrow(value) else value
        if type(value) in (list, tuple):
            return type(value)(self._widened(each) for each in value)
        return value


def _device(args: Any, kwargs: Any) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"
