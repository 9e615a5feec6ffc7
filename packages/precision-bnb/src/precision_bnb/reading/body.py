"""One function's statements and expressions, followed over what its variables may be."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from precision_bnb.reading.folding import Plain, folded
from precision_bnb.reading.source import changing
from precision_bnb.reading.values import Bound, First, Nested, Super, elements, firsts, items, new

if TYPE_CHECKING:
    from precision_bnb.reading.reader import Reader

WEIGHTS = ("weight", "W_q")
HARMLESS = ("device", "is_cuda", "is_meta", "is_leaf", "requires_grad", "grad")
"""What may be asked of a packed weight; its dtype, shape and values are not those of floats."""
_ASKS = ("isinstance", "hasattr", "callable", "id", "type")


class Body:
    """One function's statements, run over lists of values."""

    def __init__(self, reader: Reader, function: types.FunctionType, scope: dict[str, list[Any]]) -> None:
        self.reader, self.function, self.scope = reader, function, scope
        self.returned: list[Any] = []
        self._running: set[Any] = set()

    # ---------------------------------------------------------------- statements

    def run(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: Any) -> None:
        if isinstance(node, ast.If):
            self.value(node.test)
            decided = folded(node.test, self._plain)
            if decided is not False:
                self.run(node.body)
            if decided is not True:
                self.run(node.orelse)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._bind(node.name, [Nested(node)])
            self.run(node.body)
        elif isinstance(node, ast.ClassDef):
            self.run(node.body)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self._assign(node.target, elements(self.value(node.iter)))
            self.run((*node.body, *node.orelse))
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            values = self.value(node.value) if node.value is not None else []
            for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
                self._assign(target, values)
        elif isinstance(node, ast.Return):
            self.returned += new(self.value(node.value), self.returned) if node.value is not None else []
        else:  # with, while, try, match, and expressions
            for child in ast.iter_child_nodes(node):
                self._child(child)

    def _child(self, node: Any) -> None:
        if isinstance(node, ast.stmt):
            self._statement(node)
        elif isinstance(node, ast.expr):
            self.value(node)
        elif isinstance(node, ast.withitem):
            values = self.value(node.context_expr)
            if node.optional_vars is not None:
                self._assign(node.optional_vars, values)
        else:
            for child in ast.iter_child_nodes(node):
                self._child(child)

    def _assign(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, ast.Name):
            self._bind(target.id, values)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:  # which is which is not followed: each may be any
                self._assign(part, [*values, *elements(values)])
        elif isinstance(target, ast.Starred):
            self._assign(target.value, [tuple(values)])
        else:
            self.value(target)

    def _bind(self, name: str, values: list[Any]) -> None:
        held = self.scope.setdefault(name, [])
        held += new(values, held)

    # ---------------------------------------------------------------- expressions

    def value(self, node: Any) -> list[Any]:
        """Returns what an expression may be, and notes the weights that it reads."""
        handle = getattr(self, f"_{type(node).__name__.lower()}", None)
        if handle is not None:
            found: list[Any] = handle(node)
            return found
        for child in ast.iter_child_nodes(node):
            self._child(child)
        return []

    def _name(self, node: ast.Name) -> list[Any]:
        if node.id in self.scope:
            return self.scope[node.id]
        value = self.function.__globals__.get(node.id)
        return [value] if isinstance(value, (types.FunctionType, types.ModuleType, nn.Module)) else []

    def _constant(self, node: ast.Constant) -> list[Any]:
        return [node.value]

    def _attribute(self, node: ast.Attribute) -> list[Any]:
        inner = node.value
        if node.attr in HARMLESS and isinstance(inner, ast.Attribute) and inner.attr in WEIGHTS:
            self.value(inner.value)
            return []
        return self._get(self.value(inner), node.attr)

    def _get(self, owners: list[Any], name: str) -> list[Any]:
        found: list[Any] = []
        for owner in owners:
            if isinstance(owner, First):
                if name not in HARMLESS:
                    self._read_first(owner.module)
            elif isinstance(owner, nn.Module) and name in WEIGHTS:
                self.reader.read(owner, self.function)
            else:
                found += new(self.reader.attribute(owner, name), found)
        return found

    def _read_first(self, module: nn.Module) -> None:
        first = next(iter(module.parameters()), None)
        for layer in module.modules() if first is not None else ():
            if layer._parameters.get("weight") is first:
                self.reader.read(layer, self.function)

    def _subscript(self, node: ast.Subscript) -> list[Any]:
        values, index = self.value(node.value), self.value(node.slice)
        if isinstance(node.slice, ast.Slice):
            return [tuple(elements(values))]
        key = index[0] if len(index) == 1 and isinstance(index[0], (int, str)) else None
        return [found for value in values for found in items(value, key)]

    def _call(self, node: ast.Call) -> list[Any]:
        called = node.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if isinstance(called, ast.Name) and name in _ASKS:
            for arg in node.args:
                self.value(arg.value if isinstance(arg, ast.Attribute) and arg.attr in WEIGHTS else arg)
            return []
        args: list[list[Any]] = []
        for arg in node.args:
            values = self.value(arg)
            args += [values] * len(values) if isinstance(arg, ast.Starred) else [values]
        keywords = {each.arg or "": self.value(each.value) for each in node.keywords}
        if isinstance(called, ast.Name) and name not in self.scope:
            if name == "getattr" and len(args) > 1:
                return self._get_by_name(args[0], args[1])
            if name == "super":
                return self._super()
            if name in ("enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted", "set"):
                return [tuple(each for values in args for each in (*elements(values), *firsts(values)))]
            if name == "next" and args:
                return [*firsts(args[0]), *elements(args[0])]
        if isinstance(called, ast.Attribute):
            owners = self.value(called.value)
            of_modules = self._of_modules(owners, name)
            if of_modules:
                return of_modules
            functions = self._get(owners, name)
        else:
            functions = self.value(called)
        found: list[Any] = []
        for value in functions:
            found += self._called(value, args, keywords)
        handed = [value for values in (*args, *keywords.values()) for value in values]
        functions = [
            value for value in handed if isinstance(value, (Bound, Nested, types.MethodType, types.FunctionType))
        ]
        for value in functions:  # to checkpoint, to partial, to map
            self._called(value, args[1:], keywords)
        return [*found, *functions] if name == "partial" else found

    def _called(self, value: Any, args: list[list[Any]], keywords: dict[str, list[Any]]) -> list[Any]:
        if not isinstance(value, Nested):
            return self.reader.call_value(value, args, keywords)
        if value.node in self._running:
            return []
        self._running.add(value.node)
        for parameter, values in zip(value.node.args.args, args, strict=False):
            self._bind(parameter.arg, values)
        for parameter in (*value.node.args.args, *value.node.args.kwonlyargs):
            self._bind(parameter.arg, keywords.get(parameter.arg, []))
        if isinstance(value.node, ast.Lambda):
            found = self.value(value.node.body)
        else:
            kept, self.returned = self.returned, []
            self.run(value.node.body)
            found, self.returned = self.returned, kept
        self._running.discard(value.node)
        return found

    def _get_by_name(self, owners: list[Any], names: list[Any]) -> list[Any]:
        known = [name for name in names if isinstance(name, str)]
        if known:
            return [found for name in known for found in self._get(owners, name)]
        return elements([owner for owner in owners if isinstance(owner, nn.Module)])

    def _super(self) -> list[Any]:
        """Returns what stands for `super()`: the owner, seen from the class after the one that defines this."""
        kinds = [kind for kind in self.scope.get("__class__", []) if isinstance(kind, type)]
        owners = self.scope.get(next(iter(self.function.__code__.co_varnames), ""), [])
        return [Super(kind, owner) for kind in kinds for owner in owners if isinstance(owner, kind)]

    def _of_modules(self, owners: list[Any], name: str) -> list[Any]:
        modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        if name == "parameters":
            return [First(module) for module in modules]
        if name in ("modules", "named_modules"):
            return [tuple(each for module in modules for each in module.modules())]
        if name in ("children", "named_children", "values", "items"):
            return [tuple(elements(owners))]
        if name == "get_submodule":
            return [each for module in modules for each in module.modules()]
        return []

    def _lambda(self, node: ast.Lambda) -> list[Any]:
        self.value(node.body)
        return [Nested(node)]

    def _ifexp(self, node: ast.IfExp) -> list[Any]:
        self.value(node.test)
        decided = folded(node.test, self._plain)
        first = self.value(node.body) if decided is not False else []
        return [*first, *(self.value(node.orelse) if decided is not True else [])]

    def _boolop(self, node: ast.BoolOp) -> list[Any]:
        found = []
        for part in node.values:  # a setting may keep the rest from running
            found += self.value(part)
            if folded(part, self._plain) is (not isinstance(node.op, ast.And)):
                break
        return found

    def _namedexpr(self, node: ast.NamedExpr) -> list[Any]:
        values = self.value(node.value)
        self._assign(node.target, values)
        return values

    def _several(self, node: Any) -> list[Any]:
        return [tuple(each for part in node.elts for each in self.value(part))]

    _list = _tuple = _set = _several

    def _starred(self, node: ast.Starred) -> list[Any]:
        return elements(self.value(node.value))

    def _dict(self, node: ast.Dict) -> list[Any]:
        return [tuple(each for part in node.values for each in self.value(part))]

    def _comprehension_of(self, node: Any) -> list[Any]:
        for generator in node.generators:
            self._assign(generator.target, elements(self.value(generator.iter)))
            for condition in generator.ifs:
                self.value(condition)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        return [tuple(each for part in parts for each in self.value(part))]

    _listcomp = _setcomp = _generatorexp = _dictcomp = _comprehension_of

    def _plain(self, node: ast.expr) -> list[Any]:
        """Returns the one plain value that a name or attribute has and keeps, or nothing."""
        if isinstance(node, ast.Attribute):
            if node.attr == "training" or node.attr in changing(self.function.__code__.co_filename):
                return []
            values = self._quiet(node.value)
            values = [found for value in values for found in self.reader.attribute(value, node.attr)]
        else:
            return []
        return values if len(values) == 1 and isinstance(values[0], Plain) else []

    def _quiet(self, node: ast.expr) -> list[Any]:
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.Attribute):
            return [found for value in self._quiet(node.value) for found in self.reader.attribute(value, node.attr)]
        return []
