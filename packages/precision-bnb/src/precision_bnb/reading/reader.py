"""Which layers' weights a model's own code reads: packed ones would be bytes to it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from precision_bnb.reading.body import HARMLESS, WEIGHTS, Body
from precision_bnb.reading.bytecode import chains
from precision_bnb.reading.folding import Plain
from precision_bnb.reading.source import NO_ENTRY, definition
from precision_bnb.reading.values import Bound, Super, holds_module, identity

_FOREIGN = ("torch", "peft", "bitsandbytes", "precision_bnb", "precision_core", "accelerate", "numpy", "builtins")
"""Their modules and functions are not followed: torch's layers read weights in a fast path that `replace_layers` turns
off, and peft asks what a layer is before it does."""
_DEEPEST = 30
"""Calls in calls that are followed; Python itself ends at 1000, and following one takes a dozen."""


def weight_readers(root: nn.Module, layers: Collection[nn.Module]) -> dict[nn.Module, str]:
    """Returns those of `layers` whose weight is read in a forward of `root`'s modules, and by what."""
    reader = Reader(layers)
    for module in root.modules():
        if not any(layer in reader.layers for layer in module.modules() if layer is not module):
            continue
        for entry in _entries(module, is_root=module is root):
            reader.call(entry, [[module]])
    for layer in layers:
        for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()):
            reader.call_value(hook, [[layer]])
    return reader.found


def _entries(module: nn.Module, is_root: bool) -> Iterator[types.FunctionType]:
    own = inspect.unwrap(vars(module).get("forward", lambda: None))
    unbound: Any = inspect.unwrap(getattr(own, "__func__", own))
    for forward in (unbound, _static(module, "forward")):
        if isinstance(forward, types.FunctionType):
            yield forward
    if is_root:
        for kind in type(module).__mro__:
            if _is_foreign(kind.__module__) or kind.__module__.startswith("transformers."):
                continue
            for name, value in vars(kind).items():
                function = inspect.unwrap(value) if isinstance(value, types.FunctionType) else None
                if isinstance(function, types.FunctionType) and name != "forward" and not NO_ENTRY.match(name):
                    yield function


def _is_foreign(name: str) -> bool:
    return name.partition(".")[0] in _FOREIGN


def _static(module: nn.Module, name: str) -> Any:
    """Returns what a module's class has by that name: a function, a property, or None."""
    value = inspect.getattr_static(type(module), name, None)
    if isinstance(value, (staticmethod, classmethod)):
        return value
    return inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value


class Reader:
    """Follows functions; values of expressions are lists of what they may be, empty for what is no module's affair."""

    def __init__(self, layers: Collection[nn.Module]) -> None:
        self.layers = set(layers)
        self.found: dict[nn.Module, str] = {}
        self._seen: set[Any] = set()
        self._returns: dict[Any, list[Any]] = {}
        self._depth = 0

    def read(self, module: nn.Module, function: types.FunctionType) -> None:
        while module not in self.layers and isinstance(module._modules.get("base_layer"), nn.Module):
            module = module.base_layer  # type: ignore[assignment]  # what peft wraps lends its weight
        if module in self.layers:
            self.found.setdefault(module, function.__qualname__.replace("<locals>.", ""))

    def call_value(self, value: Any, args: list[list[Any]], keywords: dict[str, list[Any]] | None = None) -> list[Any]:
        """Follows a call of a value with these arguments; returns what it may return."""
        if isinstance(value, functools.partial):
            given = [[each] for each in value.args]
            return self.call_value(value.func, [*given, *args], keywords)
        if isinstance(value, Bound):
            return self.call(value.function, [[value.owner], *args], keywords)
        if isinstance(value, types.MethodType):
            owner, method = value.__self__, inspect.unwrap(value.__func__)
            if type(method) is types.FunctionType:
                return self.call(method, [[owner], *args], keywords)
        if isinstance(value, types.FunctionType) and any((*args, *(keywords or {}).values())):
            function: Any = inspect.unwrap(value)
            return self.call(function, args, keywords) if isinstance(function, types.FunctionType) else []
        if isinstance(value, nn.Module) and value not in self.layers and any(map(holds_module, args)):
            forward = _static(value, "forward")
            if isinstance(forward, types.FunctionType):
                return self.call(forward, [[value], *args], keywords)
        return []

    def call(
        self, function: types.FunctionType, args: list[list[Any]], keywords: dict[str, list[Any]] | None = None
    ) -> list[Any]:
        if _is_foreign(str(function.__globals__.get("__name__", ""))):
            return []
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        scope = {name: list(values) for name, values in zip(names, args, strict=False)}
        scope |= {name: list(values) for name, values in (keywords or {}).items() if name in names}
        if code.co_flags & inspect.CO_VARARGS:
            rest = args[code.co_argcount :]
            scope[code.co_varnames[len(names)]] = [tuple(each for values in rest for each in values)]
        key = (code, *((name, identity(scope[name])) for name in sorted(scope)))
        if key in self._seen or self._depth > _DEEPEST:
            return self._returns.get(key, [])
        self._seen.add(key)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            try:
                scope.setdefault(name, [cell.cell_contents])
            except ValueError:  # not filled yet
                continue
        node = definition(code)
        if node is None:
            self._by_bytecode(function, scope)
            return []
        body = Body(self, function, scope)
        self._depth += 1
        for _ in range(2):  # a name may be used above where it is bound, in a loop
            body.run(node.body)
        self._depth -= 1
        self._returns[key] = body.returned
        return body.returned

    def _by_bytecode(self, function: types.FunctionType, scope: dict[str, list[Any]]) -> None:
        for name, attributes in chains(function.__code__):
            values = scope.get(name, [])
            for position, attribute in enumerate(attributes):
                if attribute in WEIGHTS and attributes[position + 1 : position + 2] not in ([key] for key in HARMLESS):
                    for value in values:
                        if isinstance(value, nn.Module):
                            self.read(value, function)
                values = [found for value in values for found in self.attribute(value, attribute)]
                for value in values:
                    if isinstance(value, Bound):
                        self.call_value(value, [])

    def attribute(self, owner: Any, name: str) -> list[Any]:
        """Returns what `owner.name` may be, without running any code of the model's."""
        if isinstance(owner, Super):
            kinds = type(owner.owner).__mro__
            after = kinds[kinds.index(owner.kind) + 1 :] if owner.kind in kinds else ()
            values = [inspect.unwrap(vars(kind)[name]) for kind in after if callable(vars(kind).get(name))]
            return [Bound(owner.owner, value) for value in values[:1] if isinstance(value, types.FunctionType)]
        if not isinstance(owner, nn.Module):
            try:
                held = vars(owner)
            except TypeError:
                return []
            if isinstance(owner, types.ModuleType):
                return [held[name]] if isinstance(held.get(name), types.FunctionType) else []
            function = inspect.getattr_static(type(owner), name, None)
            if name not in held and isinstance(function, types.FunctionType):
                return [Bound(owner, function)]
            return [held[name]] if name in held else []
        for table in (owner._modules, vars(owner)):
            if name in table:
                return [table[name]] if table[name] is not None else []
        if name in owner._parameters or name in owner._buffers:
            return []
        value = _static(owner, name)
        if isinstance(value, types.FunctionType):
            return [Bound(owner, value)]
        if isinstance(value, staticmethod) and isinstance(value.__func__, types.FunctionType):
            return [value.__func__]
        if isinstance(value, property) and isinstance(value.fget, types.FunctionType):
            return self.call(inspect.unwrap(value.fget), [[owner]])
        return [value] if isinstance(value, Plain) else []
