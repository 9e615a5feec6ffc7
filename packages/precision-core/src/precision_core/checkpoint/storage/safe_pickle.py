"""A reader of pickles that cannot execute anything, for the formats that leave no choice but pickle.

It is a machine of its own for the few opcodes that plain records need, not a filter before Python's. A filter must
foresee each trick: names computed on the stack, memo entries, extension codes that never reach `find_class`, allowed
classes whose attributes BUILD sets. Here no name is ever imported: a global is a key of the caller's table or an error,
what REDUCE may call is a function written for it, and BUILD fills in fields whose types are known.
(`torch.serialization.get_unsafe_globals_in_checkpoint` reads torch.save's zip files only and, as torch's own
`weights_only` machine, refuses the opcode STACK_GLOBAL, so every pickle of protocol 4.)
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from precision_core.checkpoint.error import CheckpointError


@dataclass(frozen=True)
class Call:
    """A global that a pickle calls: `function` stands in for it.

    It must be safe with any plain arguments, and never show, compare or hash them before it knows their types: a tuple
    that holds itself twice, 60 levels deep, is a few bytes of pickle and never done.
    """

    function: Callable[..., Any]


@dataclass(frozen=True)
class Record:
    """A class whose objects are made without `__init__` and filled in: the types each field may have, exactly.

    A pickle may give the fields as a dict, or as a tuple in their order.
    """

    kind: type
    fields: Mapping[str, tuple[type, ...]]


Allowed = Mapping[str, Any]
"""From "module.name" to a `Call`, a `Record`, or the value that the global is."""


def loads(data: bytes, allowed: Allowed, *, trust: bool = False) -> Any:
    """Returns what the pickle `data` holds: plain values, lists, tuples, dicts, and what `allowed` names.

    The bytes that are checked are the bytes that are read. `trust` hands them to Python's own pickle, which executes
    whatever they say.

    Raises:
        CheckpointError: a global that is not in `allowed`, an opcode that records do not need, or damage.
    """
    if trust:
        return pickle.loads(data)
    try:
        return _Machine(allowed).run(data)
    except CheckpointError:
        raise
    except Exception as error:  # a stack that runs empty, a memo entry that is not there, a hash that cannot be, ...
        raise CheckpointError(f"a damaged pickle, or none: {type(error).__name__}: {str(error)[:200]}") from error


class _Machine:
    def __init__(self, allowed: Allowed) -> None:
        self.allowed = allowed
        self.records = {entry.kind: entry for entry in allowed.values() if isinstance(entry, Record)}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self, data: bytes) -> Any:
        end = 0
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name in _PUSHED:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            else:
                raise CheckpointError(f"the pickle has the opcode {opcode.name}, which plain records do not need")
            end = position or 0
        if end + 1 != len(data) or len(self.stack) != 1 or self.marks:
            raise CheckpointError("the pickle has more in it than one value")
        return self.stack.pop()

    def popped(self, count: int) -> list[Any]:
        """Returns the last `count` items, which must lie above the last mark."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise IndexError("the stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def top(self) -> Any:
        self.stack += (item := self.popped(1))
        return item[0]

    # ---------------------------------------------------------------- opcodes

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        items = self.popped(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return items

    def memoize(self, _: Any) -> None:
        self.memo.append(self.top())

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def stack_global(self, _: Any) -> None:
        module, name = self.popped(2)
        if type(module) is not str or type(name) is not str:
            raise CheckpointError("the pickle asks for a global whose name is none")
        if f"{module}.{name}" not in self.allowed:
            raise CheckpointError(f"the pickle asks for {module[:100]}.{name[:100]}, which is not allowed")
        self.stack.append(self.allowed[f"{module}.{name}"])

    def reduce(self, _: Any) -> None:
        called, arguments = self.popped(2)
        if type(called) is not Call or type(arguments) is not tuple:
            raise CheckpointError(f"the pickle calls a {type(called).__name__}")
        self.stack.append(called.function(*arguments))

    def new(self, _: Any) -> None:
        record, arguments = self.popped(2)
        if type(record) is not Record or arguments != ():
            raise CheckpointError(f"the pickle makes an object of a {type(record).__name__}")
        self.stack.append(object.__new__(record.kind))

    def build(self, _: Any) -> None:
        state = self.popped(1)[0]
        target = self.top()
        record = self.records.get(type(target))
        if record is None or vars(target):  # twice would change what may be a dict's key already
            raise CheckpointError(f"the pickle sets attributes of a {type(target).__name__}")
        if type(state) is tuple and len(state) == len(record.fields):
            state = dict(zip(record.fields, state, strict=True))
        if type(state) is not dict:
            raise CheckpointError(
                f"the pickle sets the attributes of a {record.kind.__name__} to a {type(state).__name__}"
            )
        for name in state.keys() | record.fields.keys():
            if name not in state and hasattr(record.kind, name):
                continue  # the class has a default
            if name not in state or name not in record.fields or type(state[name]) not in record.fields[name]:
                kind = record.kind.__name__
                raise CheckpointError(f"the pickle has a {kind} whose {name!r} is missing, unknown or of another type")
        vars(target).update(state)

    def append(self, _: Any) -> None:
        self.extend(self.popped(1))

    def appends(self, _: Any) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        if type(self.top()) is not list:
            raise CheckpointError(f"the pickle appends to a {type(self.top()).__name__}")
        self.top().extend(items)

    def set_item(self, _: Any) -> None:
        self.update(self.popped(2))

    def set_items(self, _: Any) -> None:
        self.update(self.since_mark())

    def update(self, items: list[Any]) -> None:
        keys = items[::2]  # no tuples: see Call
        if type(self.top()) is not dict or any(type(key) not in (str, int, *self.records) for key in keys):
            raise CheckpointError("the pickle sets items of something else than a dict of plain keys")
        self.top().update(zip(keys, items[1::2], strict=True))


_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.popped(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.popped(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.popped(3))),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
}
