"""Attributes of attributes in a function's bytecode, for functions without source."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator


def chains(code: types.CodeType) -> Iterator[tuple[str, list[str]]]:
    """Yields name and attributes of each `name.a.b.c` in a function and in those defined in it."""
    name, attributes = "", list[str]()
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        if operation.startswith(("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")) and name:
            attributes.append(str(value))
            continue
        if attributes:
            yield name, attributes
        name, attributes = "", []
        if operation.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_NAME")):
            name = str(value[-1] if isinstance(value, tuple) else value)  # several at once, from Python 3.13 on
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from chains(constant)
